"""SparseGPT's update: column after column, those to the right make up for what is lost.

Shape legend: R, C rows and columns of a matrix; c columns of one step.
"""

import torch
from torch import Tensor

from lightning_modules.block_sparsity.inputs import damped
from lightning_modules.block_sparsity.masks import best_of_groups, lowest
from lightning_modules.block_sparsity.updates.base import Choice, Update


class Obs(Update):
    """The optimal brain surgeon's update, each weight once, from left to right. SparseGPT, arXiv 2301.00774, §3.2–3.3.

    With U the upper Cholesky factor of M⁻¹ = UᵀU, a pruned weight w of column i changes those to its right in its row
    by −w/U_ii · U_i,i+1:. The best that these can do; what stays on the left is not asked again.

    Args:
        adaptive: Choose masks as it goes, by w²/U_ii² of the weights as they are by then: groups when their first
            column is reached, unstructured ones for all columns of a step together. Otherwise the score chooses all.
        step: Columns after which the rest of the matrix is changed: speed, and the span of an unstructured choice.
        damping: See ``Update``.
    """

    def __init__(self, adaptive: bool = True, step: int = 128, damping: float = 0.01) -> None:
        super().__init__(damping)
        if step < 8 or step % 8:
            raise ValueError(f"update: step must be a multiple of 8, got {step}")
        self.adaptive, self.step = adaptive, step

    def apply(
        self, weight_RC: Tensor, keep_RC: Tensor, moments_CC: Tensor, choice: Choice | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Update.apply``."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moments_CC, self.damping)))
        upper = torch.linalg.cholesky(inverse, upper=True).float()
        weight, keep = weight_RC.clone(), keep_RC.clone()
        choice = choice if self.adaptive else None
        for first in range(0, weight.shape[1], self.step):
            here = slice(first, first + self.step)
            w, u = weight[:, here], upper[here, here]
            if choice is not None and not choice.of:
                keep[:, here] = _unstructured(w, u, keep[:, here], choice, here)
            errors = torch.zeros_like(w)
            for i in range(w.shape[1]):
                if choice is not None and choice.of and (first + i) % choice.of == 0:
                    group = slice(first + i, first + i + choice.of)
                    keep[:, group] = _group(w[:, i : i + choice.of], u, keep[:, group], choice, group, i)
                errors[:, i] = w[:, i].masked_fill(keep[:, first + i], 0.0) / u[i, i]
                w[:, i:].addr_(errors[:, i], u[i, i:], alpha=-1)
            weight[:, here.stop :].addmm_(errors, upper[here, here.stop :], alpha=-1)
        return weight.masked_fill_(~keep, 0.0), keep

    @classmethod
    def examples(cls) -> "list[Obs]":
        """See ``Variant.examples``."""
        return [cls(), cls(adaptive=False, step=8)]


def _group(w: Tensor, u: Tensor, keep: Tensor, choice: Choice, columns: slice, i: int) -> Tensor:
    free = choice.free_RC[:, columns]
    saliency = (w / u.diagonal()[i : i + w.shape[1]]).square().masked_fill_(~free, -1.0)
    return torch.where(free, best_of_groups(saliency, choice.kept, choice.of), keep)


def _unstructured(w: Tensor, u: Tensor, keep: Tensor, choice: Choice, columns: slice) -> Tensor:
    free = choice.free_RC[:, columns]
    saliency = (w / u.diagonal()).square()
    count = torch.tensor([int(choice.sparsity * w.numel()) - int((~free).sum())], device=w.device).clamp_min_(0)
    gone = lowest(saliency.reshape(1, -1), free.reshape(1, -1), count).view(w.shape)
    return free & ~gone
