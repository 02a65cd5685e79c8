"""The best values under a mask.

Shape legend: R, C rows and columns of a matrix.
"""

import torch
from torch import Tensor

from lightning_modules.block_sparsity.inputs import Moments
from lightning_modules.block_sparsity.updates.base import Choice, Update
from lightning_modules.block_sparsity.updates.obs import Obs


class ConjugateGradient(Update):
    """Conjugate gradients on the least-squares problem of each row, over the weights that the mask keeps.

    Comes as close as wanted to the optimum for the mask, where ``Obs`` looks at each weight once. The second half of
    ALPS (arXiv 2406.07831), preconditioned by M's diagonal.

    Args:
        steps: Steps; each takes 2·R·C² operations.
        start: Where it starts, and who decides the mask where there is a choice; None starts at the masked weights.
        damping: See ``Update``.
    """

    def __init__(self, steps: int = 16, start: Update | None = None, damping: float = 0.01) -> None:
        super().__init__(damping)
        if steps < 1:
            raise ValueError(f"update: steps must be at least 1, got {steps}")
        self.steps, self.start = steps, start

    def apply(
        self, weight_RC: Tensor, keep_RC: Tensor, moments: Moments, choice: Choice | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Update.apply``."""
        matrix = moments.damped(self.damping)
        matrix = matrix.div_(matrix.diagonal().mean()).float()  # of size 1, so that float32 has room on both sides
        found, keep = weight_RC.masked_fill(~keep_RC, 0.0), keep_RC
        if self.start is not None:
            found, keep = self.start.apply(weight_RC, keep_RC, moments, choice)
        pruned = ~keep
        diagonal = matrix.diagonal()
        residual = ((weight_RC - found) @ matrix).masked_fill_(pruned, 0.0)
        ahead = residual / diagonal
        size = (residual * ahead).sum(1, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny
        for _ in range(self.steps):
            curved = (ahead @ matrix).masked_fill_(pruned, 0.0)
            length = size / (ahead * curved).sum(1, keepdim=True).clamp_min(tiny)
            found = found + length * ahead
            residual = residual - length * curved
            scaled = residual / diagonal
            before, size = size, (residual * scaled).sum(1, keepdim=True)
            ahead = scaled + size / before.clamp_min(tiny) * ahead
        return found, keep

    @classmethod
    def examples(cls) -> "list[ConjugateGradient]":
        """See ``Variant.examples``."""
        return [cls(), cls(steps=4, start=Obs())]
