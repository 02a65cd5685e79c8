"""Codec kernels give what the reference gives, bit by bit.

On gradients of very different sizes and with error feedback: the decoded mean, and what is owed. Where codes are sums
the order of summation may change the last digits.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.setting import Setting, at_most
from strategies.compressors.blocks import BlockCodec
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.natural import NaturalCompression
from strategies.compressors.onebit import OneBit
from strategies.kernels import Job
from strategies.kernels.step import Backend, agree
from strategies.traffic import Traffic
from strategies.units import Unit

LIMIT_S, GPUS = 80.0, 1
KERNELS: tuple[type[BlockCodec], ...] = (Int8, Int4, OneBit, NaturalCompression)
_RANKS = 2
_SIZE = (1 << 13) + 3 * 256 + 71  # of a row: programs and the last block end early, and the next row lies unaligned


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """How many codecs differ or refused themselves, as kernels and as the compiled code that training uses."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(_RANKS * _SIZE, generator=draw) * torch.logspace(-8, 2, _RANKS * _SIZE)
    gradient = gradient[torch.randperm(len(gradient), generator=draw)].to(setting.device).view(_RANKS, -1)
    backends: tuple[Backend, ...] = ("triton", "compiled") if setting.device.type == "cuda" else ("slabs",)
    for backend in backends:
        wrong, ran_as = [], {}
        for cls in KERNELS:
            codec: Any = cls()  # type: ignore[call-arg] # these have defaults
            mine = copy.deepcopy(codec)
            for use in ("reduce", "owing"):
                mine.warm_up(Job(backend, setting.device, _RANKS), use)
            alike = all(agree(wanted, got, codec.sums) for wanted, got in _results(codec, mine, gradient))
            ran_as[cls.__name__] = dict(mine.steps.backends)
            if not alike or refused(mine, backend):
                wrong.append(cls.__name__)
        what = f"of {len(KERNELS)} codecs, those that differ from the reference or refused themselves, run as {backend}"
        yield at_most(f"differing-{backend}", what, len(wrong), 0, wrong=wrong, ran_as=ran_as)


def refused(codec: BlockCodec, backend: Backend) -> list[str]:
    """Steps that were warmed up and do not run as asked; one that does not repeat its reference is not adopted.

    Args:
        codec: After ``warm_up``.
        backend: As which it was asked to run; without a kernel "triton" means "compiled".
    """
    found = []
    for step, ran in codec.steps.backends.items():
        wanted = "compiled" if backend == "triton" and codec.kernel(step) is None else backend
        if ran != wanted or not getattr(getattr(codec.steps, step), "in_use", True):
            found.append(step)
    return found


def _results(codec: BlockCodec, mine: BlockCodec, gradient: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Decoded mean, and what is owed, of reference and the codec under test."""
    both = []
    for one in (codec, mine):
        unit = Unit("unit", [], gradient.numel(), None, Traffic())
        unit.world_size = _RANKS
        owed, output = torch.zeros_like(gradient), torch.empty_like(gradient[0])
        payload = one.encode(gradient, unit, owed) if one.fuses else one.encode(gradient, unit)
        one.average(payload, output, unit)
        both.append((output, owed))
    return zip(*both, strict=True)
