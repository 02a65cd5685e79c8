"""Kept columns refitted by damped least squares."""

from collections.abc import Sequence

import torch

from lightning_modules.structured_pruning.compensation.base import Compensation
from lightning_modules.structured_pruning.moments import Matrix, Moments


class LeastSquares(Compensation):
    """The weights nearest to Σ ‖y − W x‖² = min: W' = (Σ y xᵀ + λ W) (Σ x xᵀ + λ I)⁻¹, with W as sliced.

    x is what the sliced layer's matrix is given after a prefix that is already pruned and refitted, y what it should
    give. λ is a share of the mean diagonal of Σ x xᵀ, chosen for every matrix. It is the update of ZipLM (arXiv
    2302.04089) and SlimGPT (arXiv 2412.18110), for all removed columns at once; following the dense model is what GPTAQ
    does in quantisation (arXiv 2504.02692).

    Args:
        damping: Shares to try.
        folds: See ``Compensation``.
        bias: See ``Compensation``; a bias is fitted undamped.
        follow: See ``Compensation``.
        relative: See ``Compensation``.

    Raises:
        ValueError: No damping, one that is not positive, or fewer than 2 folds.
    """

    def __init__(
        self,
        damping: Sequence[float] = (1e-3, 1e-1, 1.0, 10.0),
        folds: int = 4,
        bias: bool = False,
        follow: bool = False,
        relative: bool = True,
    ) -> None:
        super().__init__(folds, bias, follow, relative)
        if not damping or any(share <= 0 for share in damping):
            raise ValueError(f"compensation: damping must be positive numbers, got {list(damping)}")
        self.damping = tuple(damping)

    @property
    def settings(self) -> Sequence[float | None]:
        """See ``Compensation.settings``."""
        return self.damping

    def quick(self) -> "LeastSquares":
        """See ``Compensation.quick``: one damping, and nothing to choose."""
        middle = sorted(self.damping)[len(self.damping) // 2]
        return LeastSquares((middle,), 2, self.bias, self.follow, self.relative)

    def fewest_tokens(self, inputs: int, outputs: int) -> int:
        """See ``Compensation.fewest_tokens``: as many as there are inputs."""
        return inputs

    def solve(self, matrix: Matrix, moments: Moments, setting: float | None) -> Matrix:
        """See ``Compensation.solve``."""
        weight, bias = matrix
        xx, xy = moments.xx, moments.xy
        if bias is not None:  # fitted undamped: the weights see deviations from the means
            xx = xx - moments.x.outer(moments.x) / moments.weight
            xy = xy - moments.x.outer(moments.y) / moments.weight
        damping = (setting or 0.0) * xx.diagonal().mean().clamp_min(torch.finfo(xx.dtype).tiny)
        left = xx.clone()
        left.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(left)
        fitted = torch.cholesky_solve(xy + damping * weight.T, factor).T
        if failed:  # too little damping for this text: never chosen
            fitted = torch.full_like(fitted, torch.nan)
        return Matrix(fitted, None if bias is None else (moments.y - fitted @ moments.x) / moments.weight)
