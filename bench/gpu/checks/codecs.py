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

LIMIT_S, GPUS = 60.0, 1
KERNELS: tuple[type[BlockCodec], ...] = (Int8, Int4, OneBit, NaturalCompression)
_RANKS = 2


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """How many codecs differ."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(1 << 14, generator=draw) * torch.logspace(-8, 2, 1 << 14)
    gradient = gradient[torch.randperm(len(gradient), generator=draw)].to(setting.device).view(_RANKS, -1)
    backend: Backend = "triton" if setting.device.type == "cuda" else "slabs"
    wrong, ran_as = [], {}
    for cls in KERNELS:
        codec: Any = cls()  # type: ignore[call-arg] # these have defaults
        mine = copy.deepcopy(codec)
        used = mine.warm_up(Job(backend, setting.device, _RANKS))
        used |= mine.warm_up(Job(backend, setting.device, _RANKS), "owing")
        ran_as[cls.__name__] = sorted(used)
        if not all(agree(wanted, got, codec.sums) for wanted, got in _results(codec, mine, gradient)):
            wrong.append(cls.__name__)
    if backend == "triton":  # a kernel that does not repeat the reference is not adopted in the first place
        wrong += [name for name, used in ran_as.items() if backend not in used and name not in wrong]
    what = f"of {len(KERNELS)} codecs, those that differ from the reference, run as {backend}"
    yield at_most("differing", what, len(wrong), 0, wrong=wrong, ran_as=ran_as)


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
