"""What the experiments on local steps and on two levels say of runs, on records made up for it."""

import json

import pytest

from bench.experiments import local_steps, two_levels


def _figures(path):
    return {one["figure"]: one for one in map(json.loads, path.read_text().splitlines())}


def _timed(seed, network, method, seconds):
    axes = {"seed": seed, "network": network, "method": method}
    return {"axes": axes, "target_ppl": 620, "time_to_target_ppl_s": seconds}


def _scored(seed, method, ppl):
    return {"axes": {"seed": seed, "method": method}, "val_ppl": ppl}


def test_local_steps_are_held_against_none_seed_by_seed(tmp_path, monkeypatch):
    times = {"none": (120.0, 130.0), "local16": (12.0, 10.0), "local64": (8.0, None), "streaming16": (20.0, 13.0)}
    timed = [_timed(f"s{i}", "100mbit", m, values[i]) for m, values in times.items() for i in (0, 1)]
    ppls = {"none": (100.0, 200.0), "fp32_64": (100.5, 201.0), "int4_16": (102.0, 204.0), "int4_256": (110.0, 220.0)}
    scored = [_scored(f"s{i}", m, values[i]) for m, values in ppls.items() for i in (0, 1)]
    monkeypatch.setattr(local_steps, "sweep", lambda name, _: timed if name == "local_steps" else scored)
    local_steps.run(tmp_path / "records.jsonl", tmp_path)
    found = _figures(tmp_path / "records.jsonl")
    assert found["gain-100mbit"]["value"] == pytest.approx((10 + 13) / 2)  # local16: local64 missed a seed
    assert found["gain-100mbit"]["reached"] is False and "`local16`" in found["gain-100mbit"]["what"]
    assert found["time-100mbit-local64"]["value"] is None and "1 of 2 seeds" in found["time-100mbit-local64"]["what"]
    assert found["quality-fp32_64"]["value"] == pytest.approx(0.5) and found["quality-fp32_64"]["reached"]
    assert found["quality-int4_16"]["reached"] is False and found["quality-int4_256"]["reached"] is None


def _sent(method, megabytes, step_ms, inter=None):
    packets = 1000
    nic = int(10 * megabytes * 1e6) + 66 * packets
    levels = {} if inter is None else {"bytes_by_level": {"inter": int(10 * inter * 1e6), "intra": 1}}
    counters = {"bytes_nic_total": nic, "packets_nic_total": packets, "steps_measured": 10, "link_rate": "100mbit"}
    return {"axes": {"network": "100mbit", "method": method}, "step_time_ms_p50": step_ms, **counters, **levels}


def test_two_levels_are_held_against_the_interface_and_the_flat_forms(tmp_path, monkeypatch):
    runs = [
        _sent("hsdp_none", 8.0, 900.0, inter=4.0),
        _sent("hsdp_int8", 2.0, 300.0, inter=0.9),
        _sent("ddp_int8", 6.0, 500.0),
        _sent("ddp_two_int8", 3.0, 400.0, inter=1.5),
        *(_sent(flat, 4.0, 600.0) for flat in ("flat_none", "flat_int8", "flat_int8_both")),
        _sent("flat_two_hops", 3.0, 600.0, inter=0.9),
    ]
    runs = [{"bytes_parameters_total": 20_000_000, **one} for one in runs]  # a rank's; half of it leaves the host
    monkeypatch.setattr(two_levels, "sweep", lambda name, _: runs)
    two_levels.run(tmp_path / "records.jsonl", tmp_path)
    found = _figures(tmp_path / "records.jsonl")
    assert (
        found["between-hosts-hsdp_none"]["value"] == pytest.approx(8.0) and found["between-hosts-hsdp_none"]["reached"]
    )
    assert found["between-hosts-hsdp_int8"]["reached"] is False  # 2.0 by the interface, 1.8 counted
    assert found["bytes-hsdp_int8-over-hsdp_none"]["value"] == pytest.approx(4.0)
    assert found["step-hsdp_int8-over-hsdp_none"]["reached"] and found["bytes-ddp_two_int8-over-ddp_int8"]["reached"]
    assert found["step-ddp_two_int8-over-ddp_int8"]["reached"] is None
    assert found["gradients-two-hops-over-flat"]["value"] == pytest.approx((4 - 2) / (3 - 2))
    assert found["gradients-two-hops-over-flat"]["reached"] and found["between-hosts-flat_two_hops"]["reached"] is None
