import gzip
import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from common.trace import intervals
from common.trace.summary import summarise, table
from common.trace.timeline import operator_name, read_timeline

UNITS, STEPS = 3, 3


def _train(folder: str) -> None:
    """Train a small FSDP1 model; this rank's profiler trace of three steps."""
    warnings.simplefilter("ignore")  # FSDP1 still calls collectives that torch 2.13 renames
    rank = dist.get_rank()
    model = FullyShardedDataParallel(
        nn.Sequential(*[nn.Linear(64, 64) for _ in range(UNITS)]),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def save(profiler):
        profiler.export_chrome_trace(f"{folder}/rank{rank}.json" + (".gz" if rank else ""))

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as profiler:
        for _ in range(4):
            loss = model(torch.randn(8, 64)).pow(2).sum()
            loss.backward()
            value = loss.detach()
            dist.all_reduce(value)
            dist.broadcast(value, 0)
            received = torch.empty(2)
            dist.all_to_all_single(received, torch.ones(2))
            (dist.send if rank == 0 else dist.recv)(received, 1 - rank)
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()


@pytest.fixture(scope="module")
def traces(two_ranks, tmp_path_factory):
    """Traces of a real FSDP run of two ranks: rank 0 as .json, rank 1 as .json.gz."""
    folder = tmp_path_factory.mktemp("traces")
    two_ranks.run(_train, str(folder))
    return folder / "rank0.json", folder / "rank1.json.gz"


def test_gloo_runs_are_named_after_the_operator_that_queued_them(traces):
    for rank, path in enumerate(traces):
        timeline = read_timeline(path)
        calls = Counter(c.operator for c in timeline.communications)
        # Each call appears twice: the c10d operator and gloo's run of it.
        assert calls["reduce_scatter"] == 2 * UNITS * STEPS
        assert calls["all_gather"] % (2 * UNITS * STEPS) == 0 and calls["all_gather"] > 0
        for operator in ("all_reduce", "broadcast", "all_to_all", "recv" if rank else "send"):
            assert calls[operator] == 2 * STEPS, operator
        assert "other" not in calls


def test_a_real_cpu_trace_adds_up(traces):
    for rank, path in enumerate(traces):
        summary = summarise(path)
        assert (summary["device"], summary["backend"]) == ("cpu", "gloo")
        assert (summary["rank"], summary["world_size"]) == (rank, 2)
        assert len(summary["steps"]) == STEPS
        for step in [*summary["steps"], summary]:
            parts = step["compute_ms"] + step["comm_ms"] - step["overlap_ms"] + step["idle_ms"]
            assert parts == pytest.approx(step["step_ms"])
            assert min(step["compute_ms"], step["comm_ms"], step["idle_ms"]) > 0
            assert 0 <= step["overlap_ms"] <= min(step["compute_ms"], step["comm_ms"])
            total, backward = step["comm_ms_by_op"], step["backward_comm_ms_by_op"]
            assert max(total.values()) <= step["comm_ms"] <= sum(total.values()) + 1e-9
            assert backward["reduce_scatter"] == total["reduce_scatter"] > 0
            assert 0 < backward["all_gather"] < total["all_gather"]
            assert set(backward) == {"reduce_scatter", "all_gather"}


def _device_event(name, stream, start, end, launch, **arguments):
    correlation = round(launch * 1000)
    runtime = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": launch, "dur": 1}
    kernel = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start, "dur": end - start}
    return [
        {**runtime, "args": {"correlation": correlation}},
        {**kernel, "args": {"correlation": correlation, **arguments}},
    ]


def _annotation(name, start, end, category, thread=1):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start}


CUDA_EVENTS = [
    # The host runs ahead of the device: its own annotation must not set the window.
    _annotation("ProfilerStep#5", 0, 300, "user_annotation"),
    _annotation("ProfilerStep#5", 1000, 1900, "gpu_user_annotation", thread=7),
    _annotation("ProfilerStep#5", 1100, 2100, "gpu_user_annotation", thread=20),
    _annotation("ProfilerStep#6", 2000, 2500, "gpu_user_annotation", thread=7),
    _annotation("autograd::engine::evaluate_function: MmBackward0", 100, 200, "cpu_op"),
    *_device_event("ampere_sgemm", 7, 1000, 1400, launch=10),
    *_device_event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 20, 1300, 1500, launch=20),
    *_device_event("ampere_sgemm", 7, 1500, 1700, launch=110),
    *_device_event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(...)", 20, 1600, 1800, launch=120),
    *_device_event("ncclKernel_SendRecv(...)", 20, 1800, 1900, launch=130, **{"Collective name": "all_to_allv"}),
    # Crosses into step 6: each step gets its part.
    *_device_event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 20, 1950, 2050, launch=250),
    *_device_event("elementwise", 7, 2050, 2500, launch=260),
]


def test_cuda_timeline_to_the_microsecond(tmp_path):
    path = tmp_path / "cuda.json.gz"
    info = {"rank": 3, "world_size": 8, "backend": "nccl"}
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": CUDA_EVENTS, "distributedInfo": info}).encode()))
    summary = summarise(path)
    assert (summary["device"], summary["rank"], summary["world_size"], summary["backend"]) == ("cuda", 3, 8, "nccl")
    assert [step["step"] for step in summary["steps"]] == [5, 6]
    first, second = summary["steps"]
    expected = {
        "step_ms": 1.0,  # 1000..2000, where step 6 begins
        "compute_ms": 0.6,
        "comm_ms": 0.55,
        "comm_ratio": 0.55,
        "comm_ms_by_op": {"all_gather": 0.2, "all_reduce": 0.05, "all_to_all": 0.1, "reduce_scatter": 0.2},
        "backward_comm_ms": 0.3,
        "backward_comm_ms_by_op": {"all_to_all": 0.1, "reduce_scatter": 0.2},
        "overlap_ms": 0.2,  # 1300..1400 and 1600..1700
        "overlap_ratio": 0.2 / 0.55,
        "idle_ms": 0.05,  # 1900..1950
        "step": 5,
    }
    assert set(first) == set(expected)
    for key, value in expected.items():
        assert first[key] == pytest.approx(value), key
    assert second["comm_ms_by_op"] == pytest.approx({"all_reduce": 0.05})
    assert second["overlap_ms"] == pytest.approx(0) and second["idle_ms"] == pytest.approx(0)
    assert summary["comm_ratio"] == pytest.approx(0.6 / 1.5)
    assert summary["comm_ms_by_op"]["all_gather"] == pytest.approx(0.1)


def test_a_step_without_communication_has_no_overlap_ratio(tmp_path):
    path = tmp_path / "one.json"
    events = [_annotation("ProfilerStep#1", 0, 100, "user_annotation"), _annotation("aten::mm", 10, 40, "cpu_op")]
    path.write_text(json.dumps({"traceEvents": events}))
    summary = summarise(path)
    assert summary["comm_ms"] == 0 and summary["overlap_ratio"] is None
    assert summary["world_size"] is None
    rows = table(summary, summary).markdown().splitlines()
    assert rows[0] == "| trace | one.json | one.json |"
    assert "| ranks | not recorded | not recorded |" in rows
    assert "| compute ms | 0.03 | 0.03 |" in rows
    assert "| comm hidden by compute | not recorded | not recorded |" in rows


def test_operators_inside_a_collective_are_not_compute(tmp_path):
    path = tmp_path / "staging.json"
    events = [
        _annotation("ProfilerStep#1", 0, 100, "user_annotation"),
        _annotation("aten::mm", 0, 20, "cpu_op"),
        _annotation("c10d::allreduce_", 20, 60, "cpu_op"),
        _annotation("aten::clone", 30, 50, "cpu_op"),
        _annotation("gloo:all_reduce", 55, 70, "user_annotation", thread=9),
        _annotation("aten::relu", 65, 80, "cpu_op"),
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    mean = summarise(path)
    assert mean["compute_ms"] == pytest.approx(0.035)
    assert mean["comm_ms"] == pytest.approx(0.05)
    assert mean["overlap_ms"] == pytest.approx(0.005)
    assert mean["idle_ms"] == pytest.approx(0.02)


def test_what_is_no_usable_trace_is_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="traceEvents"):
        summarise(path)
    path.write_text('{"traceEvents": []}')
    with pytest.raises(ValueError, match="ProfilerStep"):
        summarise(path)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("c10d::_reduce_scatter_base_", "reduce_scatter"),
        ("c10d::allgather_into_tensor_coalesced_", "all_gather"),
        ("c10d::alltoall_base_", "all_to_all"),
        ("c10d::recv_any_source_", "recv"),
        ("ncclDevKernel_SendRecv(x)", "send_recv"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL", "reduce"),
        ("ncclDevKernel_Generic", "other"),
    ],
)
def test_operator_names(name, operator):
    assert operator_name(name) == operator


def test_interval_sets_against_a_raster():
    generator = np.random.default_rng(0)

    def raster(pairs):
        line = np.zeros(60, dtype=bool)
        for start, end in pairs:
            line[int(start) : int(end)] = True
        return line

    for size_a, size_b in ((0, 0), (0, 5), (5, 0), (1, 1), (8, 8), (20, 3)):
        for _ in range(30):
            a, b = (generator.integers(0, 60, (size, 2)).astype(float) for size in (size_a, size_b))
            cover_a, cover_b = intervals.union(a), intervals.union(b)
            line_a, line_b = raster(a), raster(b)
            assert (np.diff(cover_a.ravel()) > 0).all()
            for cover, line in (
                (cover_a, line_a),
                (intervals.intersection(cover_a, cover_b), line_a & line_b),
                (intervals.difference(cover_a, cover_b), line_a & ~line_b),
                (intervals.clip(cover_a, 10, 30), line_a & (np.arange(60) >= 10) & (np.arange(60) < 30)),
            ):
                assert (raster(cover) == line).all()
                assert intervals.length(cover) == line.sum()
            times = np.arange(60, dtype=float)
            assert (intervals.contains(cover_a, times) == line_a).all()
