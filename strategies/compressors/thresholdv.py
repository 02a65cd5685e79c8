"""Threshold-v: every element above a threshold, as far as there is room."""

from typing import Self

from torch import Tensor

from strategies.compressors.base import Codec
from strategies.compressors.int8 import Int8
from strategies.compressors.topk import TopK, check_density


class ThresholdV(TopK):
    """Send the elements with |x| ≥ v, at most capacity·B of each block, the largest first.

    Strom, Interspeech 2015; Dutta et al., arXiv 1911.08250. How many elements pass depends on the data, which would
    make the sizes of messages, and thus a host synchronisation and a second collective, depend on it. Here the room is
    fixed: what does not fit stays behind like everything below the threshold, for error feedback to send later, and
    unused room travels as zeros. It is paid for, and counted.
    Biased. Under error feedback the residual stays near v per element: an absolute compressor (Sahu et al.,
    arXiv 2108.00951) rather than a contraction, with the same guarantee.
    Wire and bytes: those of ``TopK`` with density = capacity.

    Args:
        threshold: Smallest magnitude that is sent, in units of the gradient (with error feedback, of gradient plus
            residual).
        capacity: Room, as a share of elements in (0, 1].
        block_size: Elements that share room, a multiple of 8; 0 is a destination's whole chunk.
        values: A codec for the chosen values, e.g. ``Int8``; none sends fp32.
    """

    def __init__(
        self, threshold: float = 1e-3, capacity: float = 0.05, block_size: int = 1024, values: Codec | None = None
    ) -> None:
        if not 0 < threshold < float("inf"):
            raise ValueError(f"ThresholdV.threshold must be positive and finite, got {threshold}")
        check_density("ThresholdV.capacity", capacity)
        if block_size and round(capacity * block_size) < 1:
            raise ValueError(
                f"ThresholdV: capacity {capacity} of {block_size} elements leaves room for none; "
                f"use at least {1 / block_size:.2g}, or larger blocks"
            )
        super().__init__(capacity, block_size, values)
        self.threshold, self.capacity = threshold, capacity

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``: room for all, too little room, and a hybrid."""
        return [cls(1.5e-3, 0.25), cls(1e-3, 0.05), cls(1.5e-3, 0.25, values=Int8())]

    def select(self, chosen: Tensor) -> Tensor:
        """Zero in place of what is below the threshold; NaN is not below."""
        return chosen.masked_fill(chosen.abs() < self.threshold, 0.0)
