"""Collectives between real ranks: what is measured, and the command around it."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from bench.network import collectives
from common.records import record
from tests.conftest import ROOT


def _results_of_each():
    """What every operation leaves in its tensors, by the closure that holds them."""
    n, rank = dist.get_world_size(), dist.get_rank()
    sent, received = torch.arange(n * 2.0).view(n, 2) + 100 * rank, torch.zeros(n, 2)
    collectives._exchange(received, sent)
    expected = torch.empty(n, 2)
    dist.all_to_all_single(expected, sent)
    for operation in collectives.operations(64, torch.device("cpu")).values():
        operation()
    dist.barrier()
    return torch.equal(received, expected)


def test_exchange_is_an_all_to_all_and_all_operations_run(three_ranks):
    assert all(three_ranks.run(_results_of_each))


def test_points_hold_the_bytes_an_ideal_algorithm_sends(three_ranks):
    points, *_ = three_ranks.run(collectives.measure, [1200, 12_000], torch.device("cpu"), 0.01)
    assert [p["operation"] for p in points] == [*collectives.SHARE] * 2
    sent = {p["operation"]: p["sent_bytes"] for p in points if p["message_bytes"] == 1200}
    assert sent == {"reduce_scatter": 800, "all_gather": 800, "all_reduce": 1600, "all_to_all": 800, "exchange": 800,
                    "point_to_point": 1200}  # fmt: skip
    for p in points:
        assert p["repeats"] >= 5 and 0 < p["time_ms"] <= p["time_ms_p90"]
        assert p["bandwidth"] == pytest.approx(p["sent_bytes"] / p["time_ms"] * 1e3)


def test_summary_takes_latency_from_the_smallest_and_the_best_bandwidth():
    points = [
        {"operation": "x", "message_bytes": size, "time_ms": ms, "bandwidth": rate}
        for size, ms, rate in ((40, 2.0, 9.0), (4, 0.5, 1.0), (400, 50.0, 8.0))
    ]
    assert collectives.summary(points) == {"x": {"latency_us": 500.0, "peak_bandwidth": 9.0}}


def test_sizes():
    assert collectives.sizes(4, 70) == [4, 16, 64]
    with pytest.raises(ValueError, match="smallest <= largest"):
        collectives.sizes(8, 4)


def test_the_command_starts_ranks_and_writes_table_plot_and_record(tmp_path):
    command = [sys.executable, "-m", "bench", "collectives", "--largest=16384", "--budget_s=0.01"]
    command += [f"--records={tmp_path}/r.jsonl", f"--plot={tmp_path}/plot.png", "--markdown"]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "PARE_LINK_RATE")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    (entry,), _ = record.read(tmp_path / "r.jsonl")
    assert entry["kind"] == "collectives" and entry["world_size"] == 2 and entry["link_rate"] is None
    assert {p["message_bytes"] for p in entry["points"]} == {4096, 16384} and entry["machine"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| exchange |" in done.stdout and "bandwidth" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_within_a_gpu():
    rates = collectives.peer_copies(1 << 20, 2)
    assert len(rates) == torch.cuda.device_count() and all(rate > 1e9 for row in rates for rate in row)
