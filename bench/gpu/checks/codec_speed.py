"""Codec kernels beside the bandwidth of a copy.

A kernel's share is the bytes that it has to read and write over its time, over the same of a copy in the same turns.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from statistics import median
from typing import Any

from bench.experiments import codec_speed
from bench.gpu.checks.codecs import KERNELS
from bench.gpu.setting import Setting, at_least, found

LIMIT_S, GPUS = 90.0, 1
_LEAST = 0.6


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Every step of every codec that has kernels."""
    backend: codec_speed.Backend = "triton" if setting.device.type == "cuda" else "slabs"
    methods = [repr(cls()) for cls in KERNELS]  # type: ignore[call-arg] # these have defaults
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        codec_speed.measure(
            setting.size(1 << 26, 1 << 14), setting.size(9, 1), methods[: setting.size(4, 1)], [backend]
        )
    lines = [json.loads(line) for line in said.getvalue().splitlines() if line.startswith("{")]
    copy = median(next(line["ns"] for line in lines if line["phase"] == "copy"))
    yield found("copy", "bandwidth of a copy, read and written", 8 / copy, "GB/s")
    for line in lines:
        if line["phase"] == "copy":
            continue
        code = line["bits"] / 8
        # two ranks: codes of N elements in, their mean of N/2 float32 out
        moved = {"encode": 4 + code, "owing": 12 + code, "decode": code + 2}[line["phase"]]
        share = moved / median(line["ns"]) / (8 / copy)
        name = f"{line['method']}-{line['phase']}"
        what = f"{line['method']}, {line['phase']}, as {line['ran_as']}: share of a copy's bandwidth"
        if line["ran_as"] == "triton":
            yield at_least(name, what, share, _LEAST, ns=line["ns"], moved_bytes=moved)
        else:
            yield found(name, what, share, ns=line["ns"], moved_bytes=moved)
