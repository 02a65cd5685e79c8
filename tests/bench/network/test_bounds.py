"""Bounds against a step whose every part is known."""

import pytest

from bench.__main__ import main
from bench.network import bounds
from common.records.record import append

MACHINE = {"cpu": "x", "torch_threads": 1}
WORK = {"model": "gpt2", "model_parameters": 10, "max_length": 8, "batch_size": 2, "precision": "32-true"}


def _run(**fields):
    """Ten steps of 100 compute + 5 encode + 80 wire + 5 decode ms; 1 MB of gradients and 3 MB of parameters a step."""
    base = {"kind": "run", "run_name": "two", "world_size": 2, "machine": MACHINE, **WORK, "steps_measured": 10}
    times = {"step_time_ms_p50": 190.0, "step_time_ms_p90": 191.0, "comm_time_ms_total": 800.0}
    codec = {"compress_time_ms": 50.0, "decompress_time_ms": 50.0}
    sent = {"bytes_compressed_total": 10_000_000, "bytes_parameters_total": 30_000_000}
    return base | times | codec | sent | {"link_rate": "400mbit", "link_emulated": True} | fields


ALONE = _run(run_name="one", world_size=1, step_time_ms_p50=90.0, step_time_ms_p90=90.0, link_rate=None,
             link_emulated=None, machine={"cpu": "x", "torch_threads": 2})  # fmt: skip


def test_parts_of_a_known_step():
    limits = bounds.bounds(_run())
    assert (limits.compute_ms, limits.codec_ms, limits.wire_ms, limits.parameter_wire_ms) == (100, 10, 80, 60)
    assert (limits.serial_ms, limits.overlapped_ms, limits.modelled_ms) == (180, 100, 190)
    assert limits.best_speedup == 1.9 and limits.best_gradient_speedup == pytest.approx(190 / 160)
    assert not limits.compute_from and not bounds.suspicions(_run(), limits)


def test_compute_time_comes_from_the_same_work_on_one_rank():
    larger = _run(run_name="larger", world_size=1, batch_size=4)
    others = [larger, _run(run_name="there", world_size=1, machine={}), ALONE]
    limits = bounds.bounds(_run(), others)
    assert limits.compute_ms == 90 and limits.compute_from == "one" and limits.serial_ms == 170
    assert bounds.bounds(_run(), others[:2]).compute_from == ""


def test_a_bandwidth_may_be_given():
    local = _run(link_rate=None, link_emulated=None)
    assert bounds.bounds(local).wire_ms is None and bounds.bounds(local).serial_ms is None
    assert bounds.bounds(local, bytes_per_s=4e6).wire_ms == 1000


def test_a_modelled_step_replaces_its_communication():
    local = _run(link_emulated=False)
    assert bounds.modelled_step_ms(local, 40e6) == pytest.approx(190 - 80 + 800)
    assert bounds.bounds({**local, "step_time_ms_modelled": 300.0}).measured_ms == 300
    for field in ("comm_time_ms_total", "bytes_parameters_total", "step_time_ms_p50", "steps_measured"):
        assert bounds.modelled_step_ms(_run(**{field: None}), 40e6) is None


def test_what_was_not_recorded_has_no_bound_and_is_not_suspicious():
    bare = {"kind": "run", "run_name": "bare"}
    limits = bounds.bounds(bare)
    assert limits.compute_ms is limits.wire_ms is limits.best_speedup is None and not bounds.suspicions(bare, limits)


@pytest.mark.parametrize(
    ("fields", "records", "word"),
    [
        ({"step_time_ms_p50": 70.0, "step_time_ms_p90": 70.0}, [], "bytes alone take 80.0 ms"),
        ({"step_time_ms_p50": 84.0, "step_time_ms_p90": 84.0}, [ALONE], "one computes for 90.0 ms"),
        ({"bytes_nic_total": 39_000_000}, [], "the interface sent only 39,000,000"),
    ],
)
def test_what_beats_a_bound_is_suspicious(fields, records, word):
    run = _run(**fields)
    (found,) = bounds.suspicions(run, bounds.bounds(run, records))
    assert word in found
    marked, *_ = bounds.annotate([run, *records])
    assert marked["suspicious"] == [found] and "suspicious" not in run


@pytest.mark.parametrize(
    "fields",
    [
        {"step_time_ms_p50": 77.0, "step_time_ms_p90": 77.0},  # 4 % below, within what is always allowed
        {"step_time_ms_p50": 70.0, "step_time_ms_p90": 80.0},  # within its own spread
        {"bytes_nic_total": 41_800_000},
    ],
)
def test_what_is_within_the_noise_is_not(fields):
    assert not bounds.suspicions(_run(**fields), bounds.bounds(_run(**fields)))


def test_annotated_records_keep_earlier_reasons_and_other_kinds():
    run, figure = bounds.annotate([_run(suspicious=["as was"]), {"kind": "figure"}])
    assert run["suspicious"] == ["as was"] and run["bound_step_time_ms"] == 180 and figure == {"kind": "figure"}
    assert run["limits"]["measured_over_model"] == pytest.approx(190 / run["limits"]["model_ms"])
    assert 0 < run["limits"]["communication_share"] < 1


def test_the_command_shows_a_row_a_run(tmp_path, capsys):
    for one in (_run(), ALONE, {"kind": "failure", "run_name": "broken"}):
        append(tmp_path / "r.jsonl", one)
    assert main(["bounds", str(tmp_path / "r.jsonl"), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| two | 90 | one | 10 | 80 | 170 | 90 | 190 |")
    append(tmp_path / "none.jsonl", {"kind": "failure"})
    assert main(["bounds", str(tmp_path / "none.jsonl")]) == 1 and "no run" in capsys.readouterr().err


def test_several_ranks_of_a_host_share_its_link_and_their_own_bytes_do_not_pass_it():
    levels = {"bytes_by_level": {"intra": 35_000_000, "inter": 5_000_000}, "ranks_per_host": 2}
    limits = bounds.bounds(_run(**levels, bytes_nic_total=10_000_000))
    assert limits.wire_ms == 20 and limits.parameter_wire_ms is None  # of 40 MB of each two ranks, 10 leave the host
    assert not bounds.suspicions(_run(**levels, step_time_ms_p50=140.0, bytes_nic_total=10_000_000), limits)
    assert bounds.modelled_step_ms(_run(**levels), 40e6) == pytest.approx(190 - 80 + 200)
    partly = {"bytes_by_level": {"intra": 5_000_000, "inter": 5_000_000}}  # parameters went among all ranks at once
    for flat in (_run(ranks_per_host=2), _run(ranks_per_host=2, **partly)):
        assert bounds.bounds(flat).wire_ms is None and bounds.modelled_step_ms(flat, 40e6) is None


def test_what_overlaps_is_not_taken_from_the_step():
    assert bounds.modelled_step_ms(_run(overlaps=True), 40e6) is None
