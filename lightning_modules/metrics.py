"""Sums over a run that stay exact whatever its precision is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """Mean by weight over all batches and ranks, summed in float64.

    ``Trainer(precision="bf16-true")`` casts a module with all that is in it; sums of this metric move to devices but
    keep their type. (A count of tokens in bfloat16 stops growing at 131,072, in float32 at 16.7 million.) NaN is not
    left out.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, weight: Tensor | int) -> None:
        """Add a sum and what it is over, both 0-d."""
        self.total += total.detach().double()
        self.weight += weight

    def compute(self) -> Tensor:
        """The mean, float64; NaN where nothing was added."""
        return self.total / self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move, but never change types."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
