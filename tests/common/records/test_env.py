import json
import warnings
from contextlib import contextmanager

import pytest
import torch

from bench.__main__ import main
from bench.network import link
from common.measure import peaks
from common.records import env
from common.records.record import stamp


@pytest.fixture(scope="module")
def report():
    return env.check(trials={"link emulation": link.check})


def test_the_command_tells_the_report_in_json(report, capfd, monkeypatch):
    monkeypatch.setattr(env, "check", lambda *_: report)
    status = main(["env", "--json"])
    answer = json.loads(capfd.readouterr().out, parse_constant=lambda constant: pytest.fail(constant))
    assert (answer["command"], answer["status"]) == ("env", status) and status == (1 if report["missing"] else 0)
    assert answer["result"] == json.loads(json.dumps(report))


def test_the_report_is_of_this_machine(report):
    assert report["versions"] == stamp()["versions"]
    assert report["machine"]["cpu"] == stamp()["machine"]["cpu"]
    assert 0 < report["ram_available_gb"] <= report["machine"]["ram_gb"]
    assert len(report["speeds"]) == 1 + torch.cuda.device_count()
    for row in report["speeds"]:
        assert min(row["matmul_gflops_fp32"], row["matmul_gflops_bf16"], row["copy_gb_per_s"]) > 0
    assert report["speeds"][0]["peak_tflops_bf16"] is None
    assert report["missing"] == [], "the tests run where everything required is installed"
    assert report["distributed"]["gloo"] is torch.distributed.is_gloo_available()


def test_attention_kernels_were_really_tried(report):
    results = {(row["device"], row["kernel"], row["dtype"]): row["result"] for row in report["attention"]}
    assert len(results) == 8 * (1 + torch.cuda.device_count())
    assert results["cpu", "math", "float32"] == "ok"
    assert results["cpu", "flash", "float32"] == "ok"
    assert results["cpu", "cudnn", "float32"] != "ok"


def test_the_report_is_shown_whole(report):
    shown = {table.title: table.markdown() for table in env.tables(report)}
    assert torch.__version__ in shown["versions"]
    assert "cudnn" in shown["attention kernels, really run"]
    assert "link emulation" in shown["runs here"] and "gloo" in shown["runs here"]
    assert "matmul_gflops_fp32" in shown["measured speed"]


def test_missing_requirements_and_how_to_get_them(tmp_path, report):
    setup = tmp_path / "setup.cfg"
    setup.write_text(
        "[metadata]\nname = app\n[options]\ninstall_requires =\n    torch>=2\n    torch>=99\n    no-such-thing\n"
        "[options.extras_require]\ntest =\n    pytest>=1\n    absent-tool\ndev =\n    app[test]\n"
    )
    missing = env.requirements(setup)
    assert missing == {"": ["torch>=99", "no-such-thing"], "test": ["absent-tool"], "dev": []}
    tables = env.tables({**report, "missing": missing.pop(""), "missing_extras": missing})
    shown = next(table for table in tables if table.title == "requirements").markdown()
    assert "torch>=99, no-such-thing" in shown and "pip install -e '.[test]'" in shown


def test_an_attempt_reports_error_and_reasons():
    def fail():
        warnings.warn("because of this", stacklevel=1)
        raise RuntimeError("no kernel\nlong trace")

    assert env._attempt(lambda: None) == "ok"
    assert env._attempt(fail) == "RuntimeError: no kernel; because of this"


def test_peaks_are_dense(monkeypatch):
    assert peaks.peak_flops(torch.device("cpu"), torch.bfloat16) is None
    gpu = torch.device("cuda", 0)

    def named(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        return peaks.peak_flops(gpu, torch.bfloat16)

    assert named("NVIDIA H200") == 989.5e12
    assert named("NVIDIA H200 NVL") == 835.5e12
    assert named("NVIDIA H100 80GB HBM3") == pytest.approx(989e12, rel=0.01)
    assert named("NVIDIA A100-SXM4-80GB") == 312e12
    assert named("NVIDIA L40S") == 362e12 and named("NVIDIA L40") == 181e12 and named("NVIDIA L4") == 121e12
    assert named("NVIDIA GeForce RTX 4090") == 165.2e12 and named("NVIDIA GeForce RTX 3090") == 71e12
    assert named("NVIDIA RTX A6000") == 154.8e12 and named("NVIDIA A40") == 149.7e12
    for unknown in ("GeForce RTX 3080", "GeForce RTX 4090 Laptop GPU", "A10G", "A100-SXM4-40GB MIG 1g.5gb", "T400"):
        assert named(f"NVIDIA {unknown}") is None
    assert named("Unheard-of 9000") is None


def test_every_gpu_is_timed_as_the_current_one(monkeypatch):
    """``torch.utils.benchmark`` waits for the current device alone."""
    current, timed = [torch.device("cuda", 0)], []

    @contextmanager
    def chosen(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    def seconds(*call):
        timed.append(current[0])
        return 1.0

    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(env, "devices", lambda: gpus)
    monkeypatch.setattr(env, "_seconds", seconds)
    monkeypatch.setattr(env, "peak_flops", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "device", chosen)
    for make in ("randn", "ones"):
        monkeypatch.setattr(torch, make, lambda *size, device, dtype=None: torch.empty(1))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: tensor)
    assert [row["device"] for row in env.speeds()] == ["cuda:0", "cuda:1"]
    assert timed == [gpus[0]] * 3 + [gpus[1]] * 3
