"""Nanoseconds per element that codecs take on one thread, and up to which link rate they pay."""

from pathlib import Path
from statistics import median
from typing import Any

from bench.experiments.runs import json_lines, say
from bench.tables import figures

RECORDS = "compression.jsonl"
COMMAND = "python -m bench experiment codec_speed"
_TARGETS = {"compiled": 1.5, "slabs": 4.0}  # Int8 with error feedback, encode and decode


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    say("timing codecs; compiling takes a few minutes")
    lines = measure(folder)
    floor = lines.pop(("copy", "", "copy"))
    for (method, backend), phases in _by_arm(lines).items():
        for phase, with_feedback in (("encode", ""), ("owing", " with error feedback")):
            if phase not in phases:
                continue
            encode, decode = phases[phase]["ns"], phases["decode"]["ns"]
            both = [a + b for a, b in zip(encode, decode, strict=True)]  # of the same turn
            total = median(both)
            target = _TARGETS.get(backend) if (method, phase) == ("Int8", "owing") else None
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
                    "ran_as": phases[phase]["ran_as"],
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


def measure(folder: Path, *arguments: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What `python -m strategies.codec_speed` prints, by method, backend and phase.

    Raises:
        RuntimeError: It failed; the message ends with its last output.
    """
    lines = json_lines("strategies.codec_speed", *arguments, log=folder / "codec_speed.log")
    return {(line["method"], line["backend"], line["phase"]): line for line in lines}


def _by_arm(lines: dict[tuple[str, str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    arms: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for (method, backend, phase), line in lines.items():
        arms.setdefault((method, backend), {})[phase] = line
    return arms
