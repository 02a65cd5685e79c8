"""1-bit Adam: once Adam's variance is settled, momenta are sent instead of gradients."""

from typing import Self

import torch
from torch import Tensor

from strategies import residuals
from strategies.compressors.base import Compressor, Use
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.none_a2a import NoCompressionA2A
from strategies.compressors.onebit import OneBit
from strategies.kernels import Job
from strategies.units import Unit


class OneBitAdam(Compressor):
    """fp32 gradients for the first steps; then Adam's variance is frozen and what is sent are momenta.

    m ← β₁m + (1 − β₁)g on every rank; the mean of C(m), with error feedback, is the first moment that AdamW steps
    along, divided by the square root of the variance of step ``warmup_steps`` (Tang et al., arXiv 2102.02888). Error
    feedback in front of a plain Adam makes coarse codes worse: their noise is squared into its variance. Here it is
    averaged, as in SGD with momentum. The paper's m is the common one of the last step, which every rank must then have
    whole; here each rank keeps its own, whose mean is the same, so that full sharding can have it too: 4 more bytes
    an element of the whole unit on every rank, in checkpoints as well.

    Pare's engines freeze the variance; any AdamW of the module will do. Learning-rate schedules go on. Clipping acts on
    the mean momentum from then on. Bytes sent: 4N(n−1)/n for ``warmup_steps`` steps, then those of ``inner``.

    Args:
        inner: The method for momenta, by default ``ErrorFeedback`` of ``OneBit``. Under DDP and between replicas
            ``Bidirectional`` around that sends codes both ways.
        warmup_steps: Optimizer steps until the variance is frozen; the paper takes 15 to 20 % of the run.
        beta1: β₁ of the module's AdamW.

    Raises:
        ValueError: ``warmup_steps`` is less than 1 or ``beta1`` not in [0, 1).
    """

    stateful = True
    every_step = True

    def __init__(self, inner: Compressor | None = None, warmup_steps: int = 1000, beta1: float = 0.9) -> None:
        if warmup_steps < 1:
            raise ValueError(f"OneBitAdam.warmup_steps must be at least 1, got {warmup_steps}: variance takes steps")
        if not 0 <= beta1 < 1:
            raise ValueError(f"OneBitAdam.beta1 must be in [0, 1), got {beta1}")
        self.inner, self.warmup_steps, self.beta1 = inner, warmup_steps, beta1
        self.frozen_from = warmup_steps
        self._coded = ErrorFeedback(OneBit()) if inner is None else inner
        self._dense = NoCompressionA2A()

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``: its first step is exact."""
        return [cls(warmup_steps=1)]

    def parts(self) -> list[Compressor]:
        """See ``Compressor.parts``."""
        return [self._coded]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``; momenta are float32."""
        return self._coded.warm_up(Job(job.backend, job.device, job.ranks), use)

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        momentum = self._momentum(grad, unit)
        if unit.step < self.warmup_steps:
            self._dense.reduce_scatter(grad, output, unit, sent)
        else:
            self._coded.reduce_scatter(momentum, output, unit, sent)

    def all_reduce(self, grad: Tensor, unit: Unit) -> None:
        """See ``Compressor.all_reduce``."""
        momentum = self._momentum(grad, unit)
        if unit.step < self.warmup_steps:
            self._dense.all_reduce(grad, unit)
        else:
            self._coded.all_reduce(momentum, unit)
            grad.copy_(momentum)

    def _momentum(self, grad: Tensor, unit: Unit) -> Tensor:
        """This step's m ``float32 [N]``; where it is NaN or Inf, the one that is kept stays as it was."""
        with unit.traffic.timed(unit.name, "encode", grad.device):
            kept = residuals.load(unit, "momentum", grad.numel(), grad.device)
            momentum = torch.lerp(grad.float(), kept, self.beta1)
            residuals.settle(momentum.clone(), kept)
            residuals.store(unit, "momentum", kept)
        return momentum
