"""A profiler trace of one rank as intervals: steps, compute, communication, backward.

CUDA traces are read on the device's timeline: communication is NCCL kernels, compute is every other kernel, copy and
memset. An NCCL kernel also waits for its peers, so a slow rank shows up as communication on the others.

CPU traces are read on the threads: compute is operators (`aten::…` and other namespaces, compiled graphs);
communication is the `c10d::…` operator on the calling thread (staging copies, blocking) together with the `gloo:…` run
on a worker thread. The gap between the two, and Python between operators, is idle. Gloo runs reduce-scatter as an
all-reduce and labels it so; each run is therefore named after the c10d operator that queued it, first in first out.
"""

import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.trace.intervals import difference, union

# Order matters: "reducescatter" also contains "scatter" and "reduce".
OPERATORS = {
    "reducescatter": "reduce_scatter",
    "allgather": "all_gather",
    "allreduce": "all_reduce",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send_recv",
    "recv": "recv",
    "send": "send",
    "barrier": "barrier",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
}
# Operators whose body is Python or whose time is their children's: not work by themselves.
_NOT_COMPUTE = ("autograd::", "torch::autograd::", "_c10d_functional::")
_COMPILED = "## Call CompiledFxGraph"
_STEP = re.compile(r"ProfilerStep#(\d+)$")
_NCCL_KERNEL = re.compile(r"(void )?nccl", re.IGNORECASE)


@dataclass
class Communication:
    """One communication interval in µs, and when the host asked for it."""

    operator: str
    start: float
    end: float
    asked: float


@dataclass
class Timeline:
    """What a trace says about one rank. Times in µs; covers are float64 [n, 2]."""

    device: str
    steps: dict[int, tuple[float, float]]
    compute: np.ndarray
    communications: list[Communication]
    backward: np.ndarray
    distributed: dict[str, Any] = field(default_factory=dict)


def operator_name(name: str) -> str:
    """Canonical collective name of a c10d operator, gloo label or NCCL kernel; "other" when it is none known."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    return next((canonical for key, canonical in OPERATORS.items() if key in letters), "other")


def _load(path: str | os.PathLike) -> dict[str, Any]:
    path = Path(path)
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        trace = json.loads(file.read())
    if not isinstance(trace, dict) or "traceEvents" not in trace:
        raise ValueError(f"{path} is not a Chrome trace written by torch.profiler: it has no traceEvents")
    return trace


def _classify(name: str) -> str | None:
    """Role of a CPU operator: "c10d", "backward", "compute" or None."""
    if name.startswith("c10d::"):
        return "c10d"
    if name.startswith("autograd::engine::evaluate_function"):
        return "backward"
    if name.startswith(_NOT_COMPUTE):
        return None
    return "compute" if "::" in name or name.startswith(_COMPILED) else None


def read_timeline(path: str | os.PathLike) -> Timeline:
    """Parse a trace (.json or .json.gz) into intervals.

    Raises:
        ValueError: The file is not a profiler trace, or has no ProfilerStep# annotations.
    """
    trace = _load(path)
    operators: dict[str, list[dict]] = defaultdict(list)
    annotations: list[dict] = []
    device_work: list[dict] = []
    device_steps: list[dict] = []
    asked: dict[int, float] = {}
    roles: dict[str, str | None] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        category = event.get("cat")
        if category == "cpu_op":
            name = event["name"]
            role = roles[name] if name in roles else roles.setdefault(name, _classify(name))
            if role:
                operators[role].append(event)
        elif category == "user_annotation":
            annotations.append(event)
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            device_work.append(event)
        elif category in ("cuda_runtime", "cuda_driver"):
            asked[event.get("args", {}).get("correlation")] = event["ts"]
        elif category == "gpu_user_annotation":
            device_steps.append(event)
    steps = _steps(device_steps) or _steps(annotations)
    if not steps:
        raise ValueError(f"{path} has no ProfilerStep# annotations: call profiler.step() after every training step")
    runs = [event for event in annotations if event["name"].startswith(("gloo:", "mpi:", "ucc:"))]
    if device_work:
        compute, communications = _device_intervals(device_work, asked)
        communications += _queued_runs(runs, operators["c10d"])
    else:
        compute = _cpu_compute(operators["compute"], operators["c10d"])
        communications = _queued_runs(runs, operators["c10d"])
        communications += [Communication(operator_name(e["name"]), *_span(e), asked=e["ts"]) for e in operators["c10d"]]
    backward = union(_span(event) for event in operators["backward"])
    device = "cuda" if device_work else "cpu"
    return Timeline(device, steps, compute, communications, backward, trace.get("distributedInfo") or {})


def _span(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _steps(annotations: Iterable[dict]) -> dict[int, tuple[float, float]]:
    """Windows of the ProfilerStep# annotations. On a device there is one a stream: they are joined, up to the next."""
    windows: dict[int, tuple[float, float]] = {}
    for event in annotations:
        match = _STEP.match(event["name"])
        if match:
            start, end = _span(event)
            known = windows.get(int(match[1]), (start, end))
            windows[int(match[1])] = (min(start, known[0]), max(end, known[1]))
    ordered = sorted(windows.items(), key=lambda item: item[1][0])
    following = [window[0] for _, window in ordered] + [float("inf")]
    return {number: (start, min(end, following[i + 1])) for i, (number, (start, end)) in enumerate(ordered)}


def _device_intervals(work: list[dict], asked: dict[int, float]) -> tuple[np.ndarray, list[Communication]]:
    """Compute cover and NCCL kernels of the device timeline."""
    compute, communications = [], []
    for event in work:
        if not _NCCL_KERNEL.match(event["name"]):
            compute.append(_span(event))
            continue
        arguments = event.get("args", {})
        # All-to-all and point-to-point share one SendRecv kernel; newer traces carry the collective's own name.
        operator = operator_name(arguments.get("Collective name") or event["name"])
        start, end = _span(event)
        communications.append(Communication(operator, start, end, asked.get(arguments.get("correlation"), start)))
    return union(compute), communications


def _cpu_compute(operators: list[dict], c10d: list[dict]) -> np.ndarray:
    """Operators' time less what the same thread spent inside c10d operators."""
    by_thread: dict[Any, tuple[list, list]] = defaultdict(lambda: ([], []))
    for which, events in enumerate((operators, c10d)):
        for event in events:
            by_thread[event["tid"]][which].append(_span(event))
    parts = [difference(union(work), union(inside)) for work, inside in by_thread.values()]
    return union(np.concatenate(parts)) if parts else union([])


def _queued_runs(runs: list[dict], c10d: list[dict]) -> list[Communication]:
    """Backend runs named after the c10d operator that queued them."""
    labels = {operator_name(run["name"]) for run in runs}
    waiting: dict[str, list[dict]] = defaultdict(list)
    for event in sorted(c10d, key=lambda e: e["ts"], reverse=True):
        operator = operator_name(event["name"])
        unlabelled = operator == "reduce_scatter" and operator not in labels
        waiting["all_reduce" if unlabelled else operator].append(event)
    found = []
    for run in sorted(runs, key=lambda e: e["ts"]):
        operator, asked = operator_name(run["name"]), run["ts"]
        queue = waiting[operator]
        # A run queued before the trace began has no operator in it: none that starts earlier is left to match.
        if queue and queue[-1]["ts"] <= run["ts"]:
            event = queue.pop()
            operator, asked = operator_name(event["name"]), event["ts"]
        found.append(Communication(operator, *_span(run), asked=asked))
    return found
