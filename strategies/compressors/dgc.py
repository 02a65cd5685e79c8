"""Deep gradient compression: top-k of accumulated momentum, with a warm-up of the density."""

from typing import Self

import torch
from torch import Tensor

from strategies import residuals
from strategies.compressors.base import Codec, Compressor
from strategies.compressors.topk import TopK, check_density
from strategies.units import Unit

_FIRST = 0.25  # density of the first warm-up stage; each of the four stages divides it by four (the paper's schedule)
_STAGES = 4


class DGC(Compressor):
    """Accumulate momentum locally, send its largest elements, and clear momentum and sum where something was sent.

    u ← m·u + g, v ← v + u; send top-k(v); where sent, u ← 0 and v ← v − sent (Lin et al., arXiv 1712.01887: momentum
    correction and momentum factor masking). Momentum is applied *before* sparsification, so the optimizer must have
    none (plain SGD). Densities 1/4, 1/16, 1/64, 1/256 over the warm-up, then ``density``. The paper's local clipping is
    left to the Trainer's gradient clipping, which acts on the mean. Biased; has its own error feedback.
    Wire and bytes: those of ``TopK`` at the step's density.

    Args:
        density: Share of elements to send after the warm-up, in (0, 1].
        momentum: m, in [0, 1).
        warmup_steps: Optimizer steps until ``density`` is reached.
        block_size: Elements among which the largest are chosen, a multiple of 8; 0 is a destination's whole chunk.
        values: A codec for the chosen values, e.g. ``Int8``; none sends fp32.
    """

    sparsifier = True
    stateful = owes = True
    feedback = True
    every_step = True

    def __init__(
        self,
        density: float = 0.001,
        momentum: float = 0.9,
        warmup_steps: int = 400,
        block_size: int = 1024,
        values: Codec | None = None,
    ) -> None:
        check_density("DGC", density)
        if not 0 <= momentum < 1:
            raise ValueError(f"DGC.momentum must be in [0, 1), got {momentum}")
        if warmup_steps < 0:
            raise ValueError(f"DGC.warmup_steps must be 0 or more, got {warmup_steps}")
        self.density, self.momentum, self.warmup_steps = density, momentum, warmup_steps
        self.block_size, self.values = block_size, values
        self._last = TopK(density, block_size, values)
        self._stages = [TopK(max(density, _FIRST**power), block_size, values) for power in range(1, _STAGES + 1)]

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``: without warm-up, and at its start."""
        return [cls(0.1, warmup_steps=0), cls(0.01)]

    def selector(self, step: int) -> TopK:
        """The sparsifier of an optimizer step."""
        return self._last if step >= self.warmup_steps else self._stages[step * _STAGES // self.warmup_steps]

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        with unit.traffic.timed(unit.name, "encode", grad.device):
            velocity = residuals.load(unit, "momentum", grad.numel(), grad.device)
            owed = residuals.load(unit, "residual", grad.numel(), grad.device)
            moved = velocity * self.momentum + grad
            total = owed + moved
        sent = torch.empty_like(total) if sent is None else sent
        self.selector(unit.step).reduce_scatter(total, output, unit, sent)
        with unit.traffic.timed(unit.name, "encode", grad.device):
            left = total.sub_(sent)
            # where a NaN or Inf struck, both stay as they were: the bad step is the owner's to see, not ours to keep
            good = left.isfinite() & moved.isfinite()
            left, moved = torch.where(good, left, owed), torch.where(good, moved, velocity)
            moved = torch.where(good & (sent != 0), 0.0, moved)
            for part in (left, moved):
                unit.clear_padding(part, 0)
            residuals.store(unit, "residual", left)
            residuals.store(unit, "momentum", moved)
