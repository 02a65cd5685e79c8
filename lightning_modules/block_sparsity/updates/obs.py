"""SparseGPT's update: column after column, those to the right make up for what is lost.

Shape legend: R, C rows and columns of a matrix; c columns of one step.
"""

import torch
from torch import Tensor

from lightning_modules.block_sparsity.inputs import Moments
from lightning_modules.block_sparsity.masks import best_of, lowest
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
        self, weight_RC: Tensor, keep_RC: Tensor, moments: Moments, choice: Choice | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Update.apply``."""
        upper = moments.inverse_upper(self.damping)
        weight_CR, keep_CR = weight_RC.T.contiguous(), keep_RC.T.contiguous()  # so that a column is read as a piece
        choice = choice if self.adaptive else None
        free_CR = choice.free_RC.T.contiguous() if choice is not None else None
        zeros = _zeros(free_CR, self.step, choice.sparsity) if choice and free_CR is not None and not choice.of else []
        for first in range(0, len(weight_CR), self.step):
            here = slice(first, first + self.step)
            w, u, keep = weight_CR[here], upper[here, here], keep_CR[here]
            if zeros and free_CR is not None:
                keep.copy_(_unstructured(w, u, free_CR[here], zeros[first // self.step]))
            errors = torch.empty_like(w)
            for i in range(len(w)):
                if choice is not None and free_CR is not None and choice.of and i % choice.of == 0:
                    group = slice(i, i + choice.of)
                    keep[group] = _group(w[group], u.diagonal()[group], keep[group], choice, free_CR[here][group])
                errors[i] = w[i].masked_fill(keep[i], 0.0) / u[i, i]
                w[i:].addr_(u[i, i:], errors[i], alpha=-1)
            weight_CR[here.stop :].addmm_(upper[here, here.stop :].T, errors, alpha=-1)
        keep_RC = keep_CR.T.contiguous()
        return weight_CR.T.contiguous().masked_fill_(~keep_RC, 0.0), keep_RC

    @classmethod
    def examples(cls) -> "list[Obs]":
        """See ``Variant.examples``."""
        return [cls(), cls(adaptive=False, step=8)]


def _group(w: Tensor, diagonal: Tensor, keep: Tensor, choice: Choice, free: Tensor) -> Tensor:
    saliency = (w / diagonal[:, None]).square().masked_fill_(~free, -1.0)
    return torch.where(free, torch.stack(best_of(saliency.unbind(0), choice.kept)), keep)


def _zeros(free_CR: Tensor, step: int, sparsity: float) -> list[int]:
    """Zeros of every step afterwards: what it has, or a share of its weights, the same for all that have less."""
    parts = free_CR.split(step)
    sizes, there = [part.numel() for part in parts], [int((~part).sum()) for part in parts]
    share, below = sparsity, list(range(len(parts)))
    while above := [i for i in below if there[i] > share * sizes[i]]:
        below = [i for i in below if i not in above]
        left = sparsity * sum(sizes) - sum(there[i] for i in range(len(parts)) if i not in below)
        share = max(0.0, left / sum(sizes[i] for i in below)) if below else 0.0
    return [max(zeros, int(share * size)) for zeros, size in zip(there, sizes, strict=True)]


def _unstructured(w: Tensor, u: Tensor, free: Tensor, zeros: int) -> Tensor:
    saliency = (w / u.diagonal()[:, None]).square()
    count = (zeros - (~free).sum()).view(1)
    gone = lowest(saliency.T.reshape(1, -1), free.T.reshape(1, -1), count).view(w.T.shape).T
    return free & ~gone
