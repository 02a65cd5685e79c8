"""Where a training step's time went: compute, communication by operator, overlap, idle.

The numbers come from the Chrome trace torch.profiler wrote for one rank;
`common.trace.timeline` says what counts as what.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.tables import Table, percent
from common.trace.intervals import clip, contains, intersection, length, union
from common.trace.timeline import Communication, Timeline, read_timeline


def _step_summary(timeline: Timeline, start: float, end: float) -> dict[str, Any]:
    """One step's numbers, in ms; see `summarise`."""
    compute = clip(timeline.compute, start, end)
    inside = [c for c in timeline.communications if c.end > start and c.start < end]
    in_backward = contains(timeline.backward, np.array([c.asked for c in inside], dtype=np.float64))

    def milliseconds(chosen: Iterable[Communication]) -> float:
        return length(clip(union((c.start, c.end) for c in chosen), start, end)) / 1e3

    def by_operator(chosen: list[Communication]) -> dict[str, float]:
        names = sorted({c.operator for c in chosen})
        return {name: milliseconds(c for c in chosen if c.operator == name) for name in names}

    backward = [c for c, flag in zip(inside, in_backward, strict=True) if flag]
    communication = clip(union((c.start, c.end) for c in inside), start, end)
    overlap = length(intersection(compute, communication)) / 1e3
    step, busy, sent = (end - start) / 1e3, length(compute) / 1e3, length(communication) / 1e3
    return {
        "step_ms": step,
        "compute_ms": busy,
        "comm_ms": sent,
        "comm_ratio": sent / step,
        "comm_ms_by_op": by_operator(inside),
        "backward_comm_ms": milliseconds(backward),
        "backward_comm_ms_by_op": by_operator(backward),
        "overlap_ms": overlap,
        "overlap_ratio": overlap / sent if sent else None,
        "idle_ms": step - (busy + sent - overlap),
    }


def _mean(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over steps; ratios are ratios of the means, an operator absent from a step counts 0 ms there."""
    mean: dict[str, Any] = {}
    for key in (key for key in steps[0] if key.endswith("_ms")):
        mean[key] = sum(step[key] for step in steps) / len(steps)
    for key in (key for key in steps[0] if key.endswith("_by_op")):
        names = sorted({name for step in steps for name in step[key]})
        mean[key] = {name: sum(step[key].get(name, 0.0) for step in steps) / len(steps) for name in names}
    mean["comm_ratio"] = mean["comm_ms"] / mean["step_ms"]
    mean["overlap_ratio"] = mean["overlap_ms"] / mean["comm_ms"] if mean["comm_ms"] else None
    return mean


def summarise(path: str | os.PathLike) -> dict[str, Any]:
    """Compute, communication by operator, overlap and idle time of each profiled step of one rank.

    Args:
        path: Chrome trace written by torch.profiler, .json or .json.gz.

    Returns:
        trace (file name); device ("cuda" or "cpu"); rank, world_size and backend (None when the trace does not say);
        and means over the profiled steps, in ms: step_ms, compute_ms, comm_ms (time with any communication under way),
        comm_ms_by_op (operators that run at once are each counted), backward_comm_ms and backward_comm_ms_by_op (the
        part asked for during backward), overlap_ms (communication and compute at once), idle_ms (neither); comm_ratio
        of the step and overlap_ratio of the communication (None without any). steps: the same for each step, with the
        profiler's step number.

    Raises:
        ValueError: The file is not a profiler trace, or has no ProfilerStep# annotations.
    """
    timeline = read_timeline(path)
    steps = [{"step": n, **_step_summary(timeline, *window)} for n, window in timeline.steps.items()]
    facts = {key: timeline.distributed.get(key) for key in ("rank", "world_size", "backend")}
    return {"trace": Path(path).name, "device": timeline.device, **facts, **_mean(steps), "steps": steps}


def table(*summaries: Mapping[str, Any]) -> Table:
    """Means over the profiled steps of one or more traces, one column a trace.

    Args:
        summaries: What `summarise` returned.
    """
    operators = sorted({name for summary in summaries for name in summary["comm_ms_by_op"]})
    headers = ["trace", "ranks", "rank", "steps", "step ms", "compute ms", "comm ms", "comm share"]
    headers += [f"{name} ms" for name in operators]
    headers += ["backward comm ms", "comm hidden by compute", "idle ms"]
    rows = []
    for summary in summaries:
        row = [summary["trace"], summary["world_size"], summary["rank"], len(summary["steps"])]
        row += [summary["step_ms"], summary["compute_ms"], summary["comm_ms"], percent(summary["comm_ratio"])]
        # An operator that a complete trace does not hold took no time: this 0 is measured.
        row += [summary["comm_ms_by_op"].get(name, 0.0) for name in operators]
        row += [summary["backward_comm_ms"], percent(summary["overlap_ratio"]), summary["idle_ms"]]
        rows.append(row)
    return Table(headers, rows, "mean of the profiled steps").transposed()
