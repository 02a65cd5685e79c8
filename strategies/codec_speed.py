"""`python -m strategies.codec_speed`: time the arithmetic of codecs on this machine, one JSON line a measurement.

Encoding and decoding of one rank's gradient of N elements on n ranks, without the wire: codes for all destinations,
then the mean of n rows of N/n elements. Every method and backend in turns, several times over, so that what else the
machine does falls on all alike; the copy of a tensor of N float32 is timed in the same turns.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import Tensor

from strategies.compressors import Codec, known_compressors
from strategies.compressors.blocks import BlockCodec
from strategies.kernels import Job
from strategies.kernels.step import Backend
from strategies.traffic import Traffic
from strategies.units import Unit

METHODS: dict[str, dict[str, Any]] = {
    "Int8": {},
    "Int4": {},
    "FP8": {},
    "OneBit": {},
    "SignSGD": {"scaled": True},
    "QSGD": {},
    "NaturalCompression": {},
    "TernGrad": {},
    "TopK": {},
    "RandomK": {},
    "FP16": {},
    "BF16": {},
}
_BACKENDS: list[Backend] = ["reference", "slabs", "compiled"]
_RANKS = 2


def measure(
    elements: int = 1 << 23,
    repeats: int = 7,
    methods: list[str] | None = None,
    backends: list[Backend] | None = None,
) -> None:
    """Print a JSON line for each method and backend: nanoseconds per element of the gradient, of every repeat.

    On a CPU these are CPU time of the one thread that works; on a GPU, time between events.

    Args:
        elements: Elements of the gradient.
        repeats: How often everything is measured.
        methods: Class names of codecs; all that are known here without.
        backends: How they compute; reference, slabs and compiled without.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    known = {cls.__name__: cls for cls in known_compressors()}
    arms: dict[tuple[str, str, str], Callable[[], Any]] = {}
    chosen: dict[tuple[str, str], str] = {}
    bits: dict[str, float] = {"copy": 32.0}
    source, target = (torch.randn(elements, device=device) for _ in range(2))
    for method in methods or METHODS:
        for backend in backends or _BACKENDS:
            codec: Any = known[method](**METHODS.get(method, {}))
            if not isinstance(codec, BlockCodec) and backend != "reference":
                continue  # there is nothing to choose
            began = time.monotonic()
            used = codec.warm_up(Job(backend, device, _RANKS)) | codec.warm_up(Job(backend, device, _RANKS), "owing")
            chosen[method, backend] = ", ".join(sorted(used)) or "reference"
            print(f"{method}, {backend}: ready in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
            payload, phases = _phases(codec, source)
            bits[method] = 8 * sum(part.nbytes for part in payload.values()) / elements
            arms |= {(method, backend, phase): run for phase, run in phases.items()}
    arms["copy", "", "copy"] = lambda: target.copy_(source)
    times: dict[tuple[str, str, str], list[float]] = {arm: [] for arm in arms}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for arm, run in arms.items():
                took = _seconds(run, device) / elements * 1e9
                if repeat:  # the first warms caches and allocators
                    times[arm].append(took)
    for (method, asked, phase), ns in times.items():
        line = {"method": method, "backend": asked, "ran_as": chosen.get((method, asked), ""), "phase": phase}
        setting = {"bits": bits[method], "elements": elements, "ranks": _RANKS, "device": device.type}
        print(json.dumps({**line, "ns": ns, **setting}), flush=True)


def _phases(codec: Codec, gradient: Tensor) -> tuple[dict[str, Tensor], dict[str, Callable[[], Any]]]:
    """What is sent, and what to time."""
    unit = Unit("unit", [], gradient.numel(), None, Traffic())
    unit.world_size = _RANKS  # the arithmetic of one of so many ranks, without the others
    chunks = (gradient * 1e-3).view(_RANKS, -1)
    received, output = codec.encode(chunks, unit), torch.empty_like(chunks[0])
    phases: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode(chunks, unit),
        "decode": lambda: codec.average(received, output, unit),
    }
    if isinstance(codec, BlockCodec):
        owed = torch.zeros_like(chunks)
        phases["owing"] = lambda: codec.encode_owing(chunks, owed, unit)
    return received, phases


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.thread_time()
        run()
        return time.thread_time() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


if __name__ == "__main__":
    auto_cli(measure, prog="python -m strategies.codec_speed")
