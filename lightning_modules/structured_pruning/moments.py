"""What a least-squares problem has to know of calibration text: weighted sums over tokens, in float64.

Shape legend: n tokens, K inputs of a matrix, H its outputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """What a linear layer computes: ``weight @ x + bias``; float64.

    Attributes:
        weight: ``[H, K]``.
        bias: ``[H]``; None where the layer has none.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass
class Moments:
    """Sums over tokens of what a matrix is given, x ``[K]``, and of what it should give, y ``[H]``; float64.

    Attributes:
        weight: Σ w, w being the tokens' weights: how many tokens, where each counts as one.
        x: Σ w x ``[K]``.
        y: Σ w y ``[H]``.
        xx: Σ w x xᵀ ``[K, K]``.
        xy: Σ w x yᵀ ``[K, H]``.
        yy: Σ w ‖y‖², 0-d.
    """

    weight: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def none(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        """Of no tokens."""
        shapes = ((inputs,), (outputs,), (inputs, inputs), (inputs, outputs), ())
        return cls(0.0, *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x_nK: Tensor, y_nH: Tensor, weight_n: Tensor) -> None:
        """Count some tokens by their weights, multiplied in float32 and added up in float64."""
        weight_n1 = weight_n.float()[:, None]
        x, y = x_nK.float(), y_nH.float()
        weighted = x * weight_n1
        self.weight += float(weight_n1.sum(dtype=torch.float64))
        self.x += weighted.sum(0, dtype=torch.float64)
        self.y += (y * weight_n1).sum(0, dtype=torch.float64)
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.yy += (y.double().square() * weight_n1).sum()

    def __add__(self, other: "Moments") -> "Moments":
        """Of the tokens of both."""
        return self._with(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        """Of these tokens without the others, which must be among them."""
        return self._with(other, -1)

    def _with(self, other: "Moments", sign: int) -> "Moments":
        return Moments(
            self.weight + sign * other.weight,
            torch.add(self.x, other.x, alpha=sign),
            torch.add(self.y, other.y, alpha=sign),
            torch.add(self.xx, other.xx, alpha=sign),
            torch.add(self.xy, other.xy, alpha=sign),
            torch.add(self.yy, other.yy, alpha=sign),
        )

    def error(self, matrix: Matrix) -> float:
        """Σ w ‖y − weight x − bias‖²."""
        weight, bias = matrix
        total = self.yy - 2 * (weight.T * self.xy).sum() + ((weight @ self.xx) * weight).sum()
        if bias is not None:
            total = total + self.weight * (bias @ bias) + 2 * bias @ (weight @ self.x - self.y)
        return max(float(total), 0.0)
