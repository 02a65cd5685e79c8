"""Outputs rotated, and nothing else."""

import torch

from lightning_modules.structured_pruning.compensation.base import Compensation
from lightning_modules.structured_pruning.moments import Matrix, Moments


class Rotation(Compensation):
    """W' = Q W with the orthogonal Q that brings the sliced matrix's outputs nearest to the whole one's.

    RCPU (arXiv 2510.07782): norms and angles of outputs stay, so that little calibration text cannot spoil much. Q is
    U Vᵀ of the singular value decomposition of Σ y (W x)ᵀ (orthogonal Procrustes).
    """

    def fewest_tokens(self, inputs: int, outputs: int) -> int:
        """See ``Compensation.fewest_tokens``: as many as there are outputs to rotate."""
        return outputs

    def solve(self, matrix: Matrix, moments: Moments, setting: float | None) -> Matrix:
        """See ``Compensation.solve``."""
        weight, bias = matrix
        products = moments.xy.T @ weight.T  # Σ y (W x + bias)ᵀ
        if bias is not None:
            products = products + moments.y.outer(bias)
        u, _, v = torch.linalg.svd(products)
        turn = u @ v
        return Matrix(turn @ weight, None if bias is None else turn @ bias)
