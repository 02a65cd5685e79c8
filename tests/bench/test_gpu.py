"""The acceptance run without a GPU: how it runs checks, and every check in its tiny form."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen2Config

import strategies
from bench import gpu
from bench.__main__ import main
from bench.gpu import checks, models, training
from bench.gpu.checks import codecs, structured_speed, tier_speed
from bench.gpu.setting import Setting, at_least, at_most
from bench.tables import documents
from callbacks.inference_timing import InferenceTiming
from common.records import record
from strategies.compressors.int8 import Int8
from strategies.kernels import Job
from tests.conftest import ROOT

TINY = Setting(torch.device("cpu"), True)
APART = {"memory", "engines", "engines_of_two", "engines_of_four"}  # those that need a process of their own
# In place of bench.gpu.child: one figure, then what its name says.
STAND_IN = """
import json, os, signal, sys, time
name, lines = sys.argv[1:3]
figure = dict(figure="it", what="a figure", value=1.0, unit="", target="report", reached=None, spread=None, details={})
if name == "misses": figure |= dict(target="more", reached=False)
open(lines, "w").write(json.dumps(figure) + "\\n" + ('{"figure": "torn' if name == "killed" else ""))
if name == "fails": sys.exit("out of luck")
if name == "hangs": time.sleep(300)
if name == "killed": os.kill(os.getpid(), signal.SIGKILL)
"""
# The child itself, with a check that tells its process and then waits.
HANGING_CHECK = """
import os, time
from types import SimpleNamespace
from bench.gpu import checks
from bench.gpu.child import main
from bench.gpu.setting import found
def run(setting):
    yield found("process", "id of the process", os.getpid())
    time.sleep(300)
checks.load = lambda name: SimpleNamespace(run=run)
main()
"""
ENDS = {
    "fails": "out of luck",
    "good": None,
    "hangs": "not done in 2 s",
    "killed": "killed by signal 9",
    "misses": None,
    "wide": None,
}


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {
        name: SimpleNamespace(__doc__=f"Stand-in that {name}.", LIMIT_S=2.0 if name == "hangs" else 60.0, GPUS=1)
        for name in ENDS
    }
    modules["wide"].GPUS = 2
    monkeypatch.setattr(checks, "names", lambda: sorted(modules))
    monkeypatch.setattr(checks, "load", modules.__getitem__)
    monkeypatch.setattr(gpu, "child", lambda: [sys.executable, "-c", STAND_IN])


def test_a_check_that_fails_hangs_or_is_killed_is_a_record_and_stops_nothing(stand_ins, tmp_path):
    results = tmp_path / "gpu.jsonl"
    assert main(["gpu", "--results", str(results), "--device", "cpu", "--tiny"]) == 1
    found = {one["figure"]: one for one in record.read(results)[0]}
    assert found.keys() == {f"tiny-{name}{end}" for name in ENDS if name != "wide" for end in ("", "-it")}
    for name, why in ENDS.items():
        if name != "wide":
            ended = found[f"tiny-{name}"]
            assert ended["reached"] is (why is None) and (why or "") in ended["what"] and ended["machine"]
    assert main(["gpu", "--results", str(results), "--device", "cpu", "--tiny", "--only", "good"]) == 0


def test_what_was_measured_before_a_stop_is_kept(tmp_path):
    """The command itself, told to stop while a check hangs that has measured something."""
    results = tmp_path / "gpu.jsonl"
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    program = f"""
import sys
from types import SimpleNamespace
from bench import gpu
from bench.__main__ import main
from bench.gpu import checks
checks.names = lambda: ["hangs"]
checks.load = lambda name: SimpleNamespace(__doc__="Hangs.", LIMIT_S=300.0, GPUS=1)
gpu.child = lambda: [sys.executable, {str(tmp_path / "stand_in.py")!r}]
sys.exit(main(["gpu", "--results", {str(results)!r}, "--device", "cpu", "--tiny"]))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environment)
    while not any(file.read_text().endswith("\n") for file in tmp_path.glob("*/found.jsonl")):
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM and f"stopped; what was measured until then: {results}" in said
    (found,) = record.read(results)[0]
    assert (found["figure"], found["value"]) == ("tiny-hangs-it", 1.0)


def test_what_is_measured_is_kept_at_once_and_a_check_ends_with_a_run_that_is_killed(tmp_path):
    results = tmp_path / "gpu.jsonl"
    (tmp_path / "stand_in.py").write_text(HANGING_CHECK)
    program = f"""
import sys
from pathlib import Path
from bench import gpu
gpu.child = lambda: [sys.executable, {str(tmp_path / "stand_in.py")!r}]
gpu.check("memory", Path({str(results)!r}), "cpu", True)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, env=environment)
    try:
        while not results.exists() or not record.read(results)[0]:
            assert run.poll() is None
            time.sleep(0.05)
        (found,) = record.read(results)[0]
        started = psutil.Process(int(found["value"]))
    finally:
        run.kill()
        run.wait()
    assert found["figure"] == "tiny-memory-process"
    started.wait(timeout=60)


def test_a_second_run_goes_on_where_the_first_was(stand_ins, tmp_path, monkeypatch, capsys):
    results, here = tmp_path / "gpu.jsonl", {"git_commit": "abc", "git_dirty": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(record, "stamp", lambda: {**here, "machine": {"gpus": [{"name": "H200"}]}})

    def made(*more):
        before = len(record.read(results)[0]) if results.exists() else 0
        status = main(["gpu", "--results", str(results), *more])
        ended = [one["figure"] for one in record.read(results)[0][before:] if not one["figure"].endswith("-it")]
        return [figure.removeprefix("gpu-") for figure in ended], status

    assert made("--only", "fails,good,misses") == (["fails", "good", "misses"], 1)
    monkeypatch.setattr(checks, "names", lambda: ["fails", "good", "misses"])
    capsys.readouterr()
    assert made() == (["fails", "misses"], 1)
    assert f"good: ended well in {results}; --only good makes it again" in capsys.readouterr().err
    assert made("--only", "good") == (["good"], 0)
    here["git_dirty"] = True
    assert "good" in made()[0]
    here |= {"git_dirty": False, "git_commit": "def"}
    assert "good" in made()[0] and "good" not in made()[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_by_name(capsys, tmp_path):
    results = ["--results", str(tmp_path / "gpu.jsonl")]
    assert main(["gpu", *results]) == 1 and "no GPU" in capsys.readouterr().err
    assert main(["gpu", *results, "--device", "cpu"]) == 1 and "--tiny" in capsys.readouterr().err
    asked = ["--device", "cpu", "--tiny", "--only"]
    assert main(["gpu", *results, *asked, "nothing"]) == 1 and "no check nothing" in capsys.readouterr().err
    assert main(["gpu", *results, *asked, "engines_of_two"]) == 1 and "needs 2 GPUs" in capsys.readouterr().err
    assert not (tmp_path / "gpu.jsonl").exists()


def test_a_check_that_cannot_be_imported_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.setattr(checks, "__path__", [*checks.__path__, str(tmp_path)])
    assert "broken" in gpu.chosen(None, 1)
    (tmp_path / "stand_in.py").write_text("import no_such_package")
    monkeypatch.setattr(gpu, "child", lambda: [sys.executable, str(tmp_path / "stand_in.py")])
    assert not gpu.check("broken", tmp_path / "gpu.jsonl", "cpu", True)
    (found,) = record.read(tmp_path / "gpu.jsonl")[0]
    assert found["reached"] is False and "no_such_package" in found["what"]


def test_checks_for_one_gpu_have_12_minutes_together():
    known = {name: checks.load(name) for name in checks.names()}
    assert sum(module.LIMIT_S for module in known.values() if module.GPUS == 1) <= 720
    assert all(checks.about(name).says and callable(module.run) for name, module in known.items())
    speeds = [name.endswith("_speed") for name in known]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("name", [name for name in checks.names() if name not in APART])
def test_every_check_runs_in_its_tiny_form(name):
    try:
        found = list(checks.load(name).run(TINY))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert found and json.dumps(found)
    if not name.endswith("_speed"):
        assert not [one for one in found if one["reached"] is False], found


def test_a_check_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.load("memory"), "LIMIT_S", 280.0)  # this machine may be busy
    results = tmp_path / "gpu.jsonl"
    assert gpu.check("memory", results, "cpu", True)
    names = [one["figure"] for one in record.read(results)[0]]
    assert names == ["tiny-memory-filled-1", "tiny-memory-filled-2", "tiny-memory-product", "tiny-memory"]


def _engines(monkeypatch, ranks, *ends):
    """Figures of all engines; ``ends`` are those of the first runs: what the record has else, or what is raised."""
    told = {"steps": 12, "val_loss": 5.0, "grad_rel_error": 0.01 if ranks > 1 else None, "world_size": ranks}
    asked = []

    def fit(folder, config, *arguments, timeout_s):
        asked.append((arguments, timeout_s))
        end = ends[len(asked) - 1] if len(asked) <= len(ends) else {}
        if isinstance(end, Exception):
            raise end
        return SimpleNamespace(record=told | end)

    monkeypatch.setattr(training, "fit", fit)
    return list(training.train_all(Setting(torch.device("cuda")), ranks, 100.0)), asked


def test_engines_say_what_they_measured_or_why_they_failed(monkeypatch):
    ends = (
        RuntimeError("exit status 1 of main.py\nno NCCL"),
        {"grad_rel_error": 0.5},
        TimeoutError("not done in 9 s:\nX"),
    )
    found, asked = _engines(monkeypatch, 2, *ends)
    assert [one["reached"] for one in found] == [False, False, False, True]
    assert "no NCCL" in found[0]["what"] and found[2]["what"].endswith("not done in 9 s:")
    assert all("--trainer.devices=2" in words and "--trainer.accelerator=cuda" in words for words, _ in asked)
    found, asked = _engines(monkeypatch, 4)
    assert {one["figure"] for one in found} == set(strategies.__all__)
    assert any("--trainer.strategy.replicas=2" in words for words, _ in asked)


def test_engines_of_several_ranks_must_have_exchanged_gradients(monkeypatch):
    found, _ = _engines(monkeypatch, 2, {"world_size": 1}, {"grad_rel_error": None})
    assert [one["reached"] for one in found] == [False, False, True, True]
    found, _ = _engines(monkeypatch, 1)
    assert all(one["reached"] and one["target"] == "trains" and "no gradients" in one["what"] for one in found)


def test_engines_share_the_time_that_is_left(monkeypatch):
    clock = iter([0.0, 0.0, 40.0, 40.0, 70.0])
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    _, asked = _engines(monkeypatch, 2)
    left = 100.0 - training._START_S
    assert [timeout for _, timeout in asked] == [left / 4, (left - 40) / 3, (left - 40) / 2, left - 70]


def test_ranks_are_started_without_what_a_cluster_says_of_its_own(monkeypatch):
    names, seen = ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "RANK", "WORLD_SIZE"), []
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(training, "fit", lambda *words, timeout_s: seen.append(os.environ.keys() & set(names)))
    with pytest.raises(AttributeError):  # of what a run is not
        list(training.train_all(TINY, 2, 100.0))
    assert seen == [set()] and os.environ["SLURM_NTASKS"] == "1"


def _no_kernel(place, *tensors):
    """Changes nothing."""


@pytest.mark.parametrize("bad", [None, "encode", "owing", "mean"])
def test_one_kernel_that_refuses_itself_is_wrong_whatever_the_others_do(bad, monkeypatch):
    monkeypatch.setattr(Int8, "kernel", lambda self, step: _no_kernel if step == bad else self.steps.references[step])
    codec = Int8()
    for use in ("reduce", "owing"):
        codec.warm_up(Job("triton", torch.device("cpu"), 2), use)
    assert codecs.refused(codec, "triton") == ([bad] if bad else [])


def test_operands_are_taken_in_turns():
    taken = []
    call = tier_speed.in_turns(taken.append, "abc")
    for _ in range(4):
        call()
    assert taken == ["a", "b", "c", "a"]


def test_decoding_that_takes_longer_than_its_bytes_is_said_to_be_bound_by_launches(monkeypatch):
    row = {"speedup": 1.1, "speedup_spread": 0.1, "flop_bound": 1.3, "byte_bound": 1.3, "dense_ms": 1e9}
    work = {"flops": 1.0, "bytes_read": 1.0}
    monkeypatch.setattr(InferenceTiming, "measure", lambda *args: {**row, "work_dense": work})
    said = {one["figure"]: one["what"] for one in structured_speed.run(TINY)}
    assert [name for name, what in said.items() if "bound by launches" in what] == ["decode-1", "decode-16"]
    assert not structured_speed.bound_by_launches({"dense_ms": 2.9, "dense_bytes_ms": 1.0})


def test_targets_are_missed_by_nan():
    assert at_most("a", "b", 1.0, 1.0)["reached"] and not at_most("a", "b", float("nan"), 1.0)["reached"]
    assert at_least("a", "b", 1.0, 1.0)["reached"] and not at_least("a", "b", float("nan"), 1.0)["reached"]


def test_models_made_on_a_device_know_their_positions():
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    made, usual = models.on_device(config, TINY), AutoModelForCausalLM.from_config(config).eval()
    usual.load_state_dict(made.state_dict())
    ids = torch.randint(64, (1, 40))
    assert torch.equal(made(ids).logits, usual(ids).logits) and made(ids).logits.isfinite().all()


def test_folding_takes_what_a_gpu_measured_once(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    folder = tmp_path / documents.RECORDS
    folder.mkdir(parents=True)
    made = (ROOT / "docs/results/gpu.md").read_text().rpartition(" -->\n")[0].rpartition(" -->\n")[2]
    assert ("Not run yet" in made) is not (ROOT / documents.RECORDS / "gpu.jsonl").exists()
    page = '<!-- table: figures gpu.jsonl only=gpu-* absent="not run yet" -->\n\n<!-- end -->'
    assert "not run yet" in documents.render(page, folder).replace('absent="not run yet"', "")
    gpu.check("good", tmp_path / "tiny.jsonl", "cpu", True)
    assert main(["gpu", "--fold", str(tmp_path / "tiny.jsonl")]) == 1 and "no records" in capsys.readouterr().err
    gpu.check("good", tmp_path / "sent.jsonl", "cuda", False)
    for _ in range(2):
        assert main(["gpu", "--fold", str(tmp_path / "sent.jsonl")]) == 0
    assert len(record.read(folder / "gpu.jsonl")[0]) == 2
    assert "a figure" in documents.render(page, folder)
