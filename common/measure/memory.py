"""How much memory a call needs at its peak, and how large an input fits."""

import json
import resource
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "efficient_attention", "_softmax")


def peak_bytes(call: Callable[[], object], *devices: torch.device) -> int:
    """Most bytes of tensors that a call holds at once, above what was held before it; the sum over several GPUs.

    On CUDA the allocator counts. On the CPU every allocation of torch is recorded, which slows the call down; memory
    that libraries take for themselves is not seen.
    """
    if devices[0].type == "cuda":
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = [torch.cuda.memory_allocated(device) for device in devices]
        call()
        return sum(torch.cuda.max_memory_allocated(device) for device in devices) - sum(before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max([0, *accumulate(changes)])


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(part in name for part in _ATTENTION):
            with self:  # in inference mode operators arrive whole: what they consist of is what runs
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def attention_kernels(call: Callable[[], object]) -> list[str]:
    """The attention operators that a call really runs, which may differ from those that were asked for."""
    with _Names() as names:
        call()
    return sorted(names.seen)


def longest_that_fits(fits: Callable[[int], bool], start: int, stop: int, resolution: int) -> int:
    """Largest size for which `fits` says yes, by doubling and then bisecting.

    Args:
        fits: Tries one size. Taken to be monotone.
        start: First size to try.
        stop: Largest size to try.
        resolution: Stop bisecting when the bounds are this close.

    Returns:
        A size that fits, less than `resolution` below one that does not (or `stop`); 0 when `start` does not fit.

    Raises:
        ValueError: Sizes or resolution below 1, or `stop` below `start`.
    """
    if start < 1 or resolution < 1 or stop < start:
        raise ValueError(f"need 1 ≤ start ≤ stop and resolution ≥ 1, got {start}, {stop} and {resolution}")
    good, size = 0, start
    while fits(size):
        good = size
        if size == stop:
            return stop
        size = min(2 * size, stop)
    if good == 0:
        return 0
    bad = size
    while bad - good > resolution:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def peak_bytes_so_far(device: torch.device) -> int:
    """Largest memory this process has used until now: of the GPU where one computes, else resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_process(extra: int) -> None:
    """Make this process fail to allocate more than `extra` bytes beyond what it has mapped now (Linux).

    Instead of filling the machine's memory. Heap and anonymous memory count (RLIMIT_DATA), whether touched or not;
    libraries and mapped files do not. Cannot be undone.
    """
    limit = _status("VmData") + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def resident_now() -> int:
    """Resident bytes of this process; `resident_peak` starts anew from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def resident_peak() -> int:
    """Most resident bytes of this process since `resident_now` (Linux)."""
    return _status("VmHWM")


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
