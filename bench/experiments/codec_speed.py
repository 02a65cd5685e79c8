"""Nanoseconds per element that codecs take on one thread, and up to which link rate they pay.

`python -m bench.experiments.codec_speed --help` measures some of them. Encoding and decoding of one rank's gradient of
N elements on n ranks, without the wire: codes for all destinations, then the mean of n rows of N/n elements. Every
method and backend in turns, several times over, so that what else the machine does falls on all alike; the copy of a
tensor of N float32 is timed in the same turns.
"""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import Tensor

from bench.experiments.runs import json_lines, say
from bench.tables import figures
from common.measure.timing import queued
from common.progress import duration
from common.variants import variants
from strategies.compressors import Codec
from strategies.compressors.blocks import BlockCodec
from strategies.compressors.int8 import Int8
from strategies.kernels import Job
from strategies.kernels.step import Backend
from strategies.traffic import Traffic
from strategies.units import Unit

RECORDS = "compression.jsonl"
COMMAND = "python -m bench experiment codec_speed"
_BACKENDS: list[Backend] = ["reference", "slabs", "compiled"]
_RANKS = 2
_TARGETS = {"compiled": 1.5, "slabs": 4.0}  # Int8 with error feedback, encode and decode


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    log = folder / "codec_speed.log"
    say(f"timing codecs; compiling takes a few minutes; how far it is stands in {log}")
    printed = json_lines(__spec__.name, log=log)
    lines = {(line["method"], line["backend"], line["phase"]): line for line in printed}
    floor = lines.pop(("copy", "", "copy"))
    for (method, backend), phases in _by_arm(lines).items():
        for phase, with_feedback in (("encode", ""), ("owing", " with error feedback")):
            if phase not in phases:
                continue
            encode, decode = phases[phase]["ns"], phases["decode"]["ns"]
            both = [a + b for a, b in zip(encode, decode, strict=True)]  # of the same turn
            total = median(both)
            target = _TARGETS.get(backend) if (method, phase) == (repr(Int8()), "owing") else None
            # gradients of N elements on 2 ranks: (32 − bits)·N/2 fewer bits for total·N nanoseconds
            rate = (32 - phases[phase]["bits"]) / 2 / total
            figures.append(
                records,
                figure=f"codec-{method}-{phase}-{backend}",
                what=f"`{method}`{with_feedback}, {backend}: encode {median(encode):.2g}, decode {median(decode):.2g}; "
                f"pays on links below {rate:.2g} Gbit/s",
                value=total,
                spread=(max(both) - min(both)) / 2,
                unit="ns per element",
                target=f"≤ {target}" if target else "report",
                reached=total <= target if target else None,
                command=COMMAND,
                details={
                    "codec": f"`{method}`{with_feedback}",
                    "backend": backend,
                    "encode_ns": encode,
                    "decode_ns": decode,
                    "copy_ns": floor["ns"],
                    "ran_as": ", ".join(sorted({phases[phase]["ran_as"], phases["decode"]["ran_as"]})),
                    "elements": phases[phase]["elements"],
                    "ranks": phases[phase]["ranks"],
                    "bits": phases[phase]["bits"],
                    "break_even_gbit_s": rate,
                },
            )
    figures.append(
        records,
        figure="codec-copy",
        what="copy of a float32 tensor in the same turns: the least that anything can take",
        value=median(floor["ns"]),
        spread=(max(floor["ns"]) - min(floor["ns"])) / 2,
        unit="ns per element",
        target="report",
        reached=None,
        command=COMMAND,
        details={"elements": floor["elements"]},
    )


def _by_arm(lines: dict[tuple[str, str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    arms: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for (method, backend, phase), line in lines.items():
        arms.setdefault((method, backend), {})[phase] = line
    return arms


def known() -> dict[str, Codec]:
    """An instance of every form of every codec, by its ``repr``: what a figure's name says, whatever the examples."""
    return {
        repr(example): example for cls in variants(Codec) for example in cls.examples() if isinstance(example, Codec)
    }


def chosen(names: list[str] | None) -> dict[str, Codec]:
    """Those of ``known`` that are named in full, or by their class; all without names.

    Raises:
        ValueError: There is none of a name.
    """
    found = known()
    if names is None:
        return found
    for name in names:
        if not any(name in (form, type(codec).__name__) for form, codec in found.items()):
            classes = sorted({type(codec).__name__ for codec in found.values()})
            raise ValueError(
                f"methods: there is no codec {name}; there are {', '.join(classes)}, and their forms by repr"
            )
    return {form: codec for form, codec in found.items() if form in names or type(codec).__name__ in names}


def measure(
    elements: int = 1 << 23,
    repeats: int = 7,
    methods: list[str] | None = None,
    backends: list[Backend] | None = None,
) -> None:
    """Print a JSON line for each method and backend: nanoseconds per element of the gradient, of every repeat.

    On a CPU these are CPU time of the one thread that works; on a GPU, time between events. ``ran_as`` is how the step
    of a phase ran, which may be another way than was asked for.

    Args:
        elements: Elements of the gradient.
        repeats: How often everything is measured.
        methods: Classes of codecs, or single forms as `known` has them; all without.
        backends: How they compute; reference, slabs and compiled without.

    Raises:
        ValueError: There is no such codec.
    """
    codecs = chosen(methods)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    arms: dict[tuple[str, str, str], Callable[[], Any]] = {}
    ran_as: dict[tuple[str, str, str], str] = {}
    bits: dict[str, float] = {"copy": 32.0}
    source, target = (torch.randn(elements, device=device).mul_(1e-3) for _ in range(2))
    for method in codecs:
        for backend in backends or _BACKENDS:
            codec = copy.deepcopy(codecs[method])
            if not isinstance(codec, BlockCodec) and backend != "reference":
                continue  # there is nothing to choose
            began = time.monotonic()
            used = codec.warm_up(Job(backend, device, _RANKS)) | codec.warm_up(Job(backend, device, _RANKS), "owing")
            say(f"{method}, {backend}: ready in {time.monotonic() - began:.1f} s")
            payload, phases = _phases(codec, source)
            bits[method] = 8 * sum(part.nbytes for part in payload.values()) / elements
            arms |= {(method, backend, phase): run for phase, run in phases.items()}
            ran_as |= {(method, backend, phase): _ran_as(codec, phase, used) for phase in phases}
    arms["copy", "", "copy"] = lambda: target.copy_(source)
    times: dict[tuple[str, str, str], list[float]] = {arm: [] for arm in arms}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            began = time.monotonic()
            for arm, work in arms.items():
                took = _seconds(work, device) / elements * 1e9
                if repeat:  # the first warms caches and allocators
                    times[arm].append(took)
            left = (repeats - repeat) * (time.monotonic() - began)
            say(f"turn {repeat + 1} of {repeats + 1} of {len(arms)} arms done, {duration(left)} left")
    for (method, asked, phase), ns in times.items():
        line = {"method": method, "backend": asked, "ran_as": ran_as.get((method, asked, phase), ""), "phase": phase}
        setting = {"bits": bits[method], "elements": elements, "ranks": _RANKS, "device": device.type}
        print(json.dumps({**line, "ns": ns, **setting}), flush=True)


def _phases(codec: Codec, gradient: Tensor) -> tuple[dict[str, Tensor], dict[str, Callable[[], Any]]]:
    """What is sent, and what to time."""
    unit = Unit("unit", [], gradient.numel(), None, Traffic())
    unit.world_size = _RANKS  # the arithmetic of one of so many ranks, without the others
    chunks = gradient.view(_RANKS, -1)
    received, output = codec.encode(chunks, unit), torch.empty_like(chunks[0])
    phases: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode(chunks, unit),
        "decode": lambda: codec.average(received, output, unit),
    }
    if isinstance(codec, BlockCodec) and codec.fuses:
        owed = torch.zeros_like(chunks)
        phases["owing"] = lambda: codec.encode(chunks, unit, owed)
    return received, phases


def _ran_as(codec: Codec, phase: str, used: set[str]) -> str:
    """The backend of a phase; of codecs that are made of others, all that are used."""
    if isinstance(codec, BlockCodec) and codec.fuses:
        return codec.steps.backends["mean" if phase == "decode" else phase]
    return ", ".join(sorted(used)) or "reference"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.thread_time()
        run()
        return time.thread_time() - began
    return queued(run, device) / 1e3


if __name__ == "__main__":
    auto_cli(measure, prog=f"python -m {__spec__.name}")
