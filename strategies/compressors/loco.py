"""Feedback of an averaged error in eight bits: what compression loses, smoothed, and forgotten from time to time."""

from typing import Self

import torch
from torch import Tensor

from strategies import residuals
from strategies.compressors.base import Compressor, Use
from strategies.compressors.error_feedback import keeps_residual
from strategies.compressors.int4 import Int4
from strategies.kernels import Job
from strategies.units import Unit


class LoCo(Compressor):
    """Send C(g + e) and move e towards what was lost: e ← (1 − β)e + β(g + e − what the owners understood).

    LoCo (Xie et al., arXiv 2407.04480). In front of an optimizer that squares gradients, ``ErrorFeedback`` returns
    every error whole in the next step, and its noise inflates the variance. Here errors are averaged over steps first;
    those of old weights are forgotten every ``reset`` steps. So not all of the gradient is sent in the end. The
    error is kept in 8 bits: a quarter of what ``ErrorFeedback`` holds in fp32. A NaN or Inf leaves it as it was.
    Bytes sent: those of ``inner``.

    Args:
        inner: A contractive method, by default ``Int4``.
        beta: β, how much of the newest error is taken.
        reset: Steps after which the error is forgotten; 0 never does.
        storage: How the error is kept between steps: "int8", "bfloat16" or "float32".

    Raises:
        ValueError: ``beta`` is not in (0, 1], ``reset`` is negative, or ``inner`` keeps a residual or is not
            contractive.
    """

    stateful = owes = True
    feedback = True

    def __init__(
        self,
        inner: Compressor | None = None,
        beta: float = 0.2,
        reset: int = 512,
        storage: residuals.Storage = "int8",
    ) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"LoCo.beta must be in (0, 1], got {beta}")
        if reset < 0:
            raise ValueError(f"LoCo.reset must be 0 or more steps, got {reset}")
        if storage not in ("float32", "bfloat16", "int8"):
            raise ValueError(f"LoCo.storage must be float32, bfloat16 or int8; got {storage!r}")
        method = Int4() if inner is None else inner
        if any(keeps_residual(part) for part in method.within()):
            raise ValueError(f"LoCo(inner={inner!r}): the inner method keeps its own residual; use one of them")
        self.inner, self.beta, self.reset, self.storage = inner, beta, reset, storage
        self._method = method.for_feedback()
        self.sparsifier = method.sparsifier

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls()]

    def parts(self) -> list[Compressor]:
        """See ``Compressor.parts``."""
        return [self._method]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``; what is sent is float32, and is decoded for its error."""
        own = Job(job.backend, job.device, job.ranks)
        return self._method.warm_up(own, "reduce") | self._method.warm_up(own, "apart")

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        with unit.traffic.timed(unit.name, "encode", grad.device):
            owed = residuals.load(unit, "residual", grad.numel(), grad.device)
            if self.reset and unit.step % self.reset == 0:
                owed = torch.zeros_like(owed)
            corrected = grad.float() + owed
        told = torch.empty_like(corrected) if sent is None else sent
        self._method.reduce_scatter(corrected, output, unit, told)
        with unit.traffic.timed(unit.name, "encode", grad.device):
            lost = corrected.sub_(told).sub_(owed).mul_(self.beta).add_(owed)
            residuals.settle(lost, owed)
            unit.clear_padding(owed, 0)
            residuals.store(unit, "residual", owed, self.storage)
