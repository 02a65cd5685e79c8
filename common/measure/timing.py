"""Timing that compares fairly: arms take turns, warm-up is dropped, and every number comes with its spread."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

_PAUSE = 10_000_000  # cycles of a GPU, some 5 ms


def percentiles(samples: Sequence[float], warmup: int = 0) -> dict[str, float]:
    """Summary of repeated measurements, in the samples' own unit.

    Args:
        samples: Measurements in the order they were made.
        warmup: How many at the start to leave out (compilation, caches, autotuning).

    Returns:
        mean, p50, p90, p95, iqr (p75 - p25), and n, the number of samples used. Percentiles interpolate linearly.

    Raises:
        ValueError: No sample is left after the warm-up.
    """
    used = np.asarray(samples[warmup:], dtype=np.float64)
    if not used.size:
        raise ValueError(f"no samples left: {len(samples)} measured, {warmup} of them warm-up")
    p25, p50, p75, p90, p95 = np.percentile(used, [25, 50, 75, 90, 95]).tolist()
    return {"mean": float(used.mean()), "p50": p50, "p90": p90, "p95": p95, "iqr": p75 - p25, "n": used.size}


def _synchronise() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def queued(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Milliseconds of a call on a GPU, between events, without the time in which Python prepares it.

    Launches queue up behind a pause of the GPU, so that it goes from one to the next; that holds as long as Python
    needs less than the pause for them.

    Args:
        call: What launches the work; it must not wait for the GPU.
        device: The GPU that it goes to.
        calls: How often it is called; the result is the mean.
    """
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_PAUSE)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / calls


def _from_host(call: Callable[[], object]) -> float:
    """Milliseconds of a call, CUDA synchronised before and after."""
    _synchronise()
    begin = time.perf_counter_ns()
    call()
    _synchronise()
    return (time.perf_counter_ns() - begin) / 1e6


def interleaved(
    callables: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = _from_host,
) -> dict[str, list[float]]:
    """Time several functions in turns, so that a slow minute of the machine hits all of them.

    Each round calls every function once, starting one further each time: none always runs after the same neighbour's
    cache contents. Garbage collection waits until the end.

    Args:
        callables: Functions by name.
        repeats: Timed rounds.
        warmup: Untimed rounds before them.
        clock: Makes a call and says its milliseconds; by default from the host, with CUDA synchronised before and
            after.

    Returns:
        Milliseconds of each call by name; entry i of every list comes from the same round.

    Raises:
        ValueError: There is nothing to time.
    """
    if not callables or repeats < 1:
        raise ValueError(f"nothing to time: {len(callables)} functions, {repeats} repeats")
    names = list(callables)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                elapsed = clock(callables[name])
                if turn >= warmup:
                    times[name].append(elapsed)
    finally:
        if collecting:
            gc.enable()
    return times


def ratio_with_spread(baseline: Sequence[float], candidate: Sequence[float]) -> dict[str, float]:
    """How many times faster the candidate is, from measurements taken in turns.

    Args:
        baseline: Times of the baseline.
        candidate: Times of the candidate; entry i was measured beside entry i of the baseline (see `interleaved`).

    Returns:
        ratio (median over rounds of baseline / candidate; above 1 the candidate is faster), p25 and p75 of the rounds'
        ratios, spread (half of p75 - p25), n.

    Raises:
        ValueError: The lists differ in length, are empty, or hold a time that is not above zero.
    """
    if len(baseline) != len(candidate) or not len(baseline):
        raise ValueError(f"need pairs: {len(baseline)} baseline and {len(candidate)} candidate times")
    pairs = np.asarray([baseline, candidate], dtype=np.float64)
    if not (pairs > 0).all():
        raise ValueError("times must be above zero")
    p25, p50, p75 = np.percentile(pairs[0] / pairs[1], [25, 50, 75]).tolist()
    return {"ratio": p50, "p25": p25, "p75": p75, "spread": (p75 - p25) / 2, "n": len(baseline)}
