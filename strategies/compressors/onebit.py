"""1-bit SGD: a bit per element, two means per block."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from strategies.compressors.blocks import BlockCodec, Slab
from strategies.compressors.packing import pack, unpack
from strategies.kernels import triton_kernel


class OneBit(BlockCodec):
    """Send which side of zero each element is on, and the mean of each side.

    x̂ = mean{x ≥ 0} or mean{x < 0} over the block (Seide et al., Interspeech 2014: one pair per column of a weight
    matrix; here per block, which on gradients of uneven scale loses far less than per tensor). Biased: the paper's
    algorithm is ``ErrorFeedback(inner=OneBit())``, and without error feedback it does not train well.
    Wire: 8 signs in a byte, planar, and two fp32 means per block. Padding counts in no mean.
    Bytes sent: N(1/8 + 8/B)(n−1)/n.

    Args:
        block_size: Elements that share the two means, a multiple of 8; 0 is one pair per destination.
    """

    contractive = True
    planes = 8
    masked = True
    sums = True

    def __init__(self, block_size: int = 256) -> None:
        super().__init__(block_size)

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(), cls(block_size=0)]

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block // 8, torch.uint8), "scales": (2, torch.float32)}

    def kernel(self, name: str) -> Callable[..., None] | None:
        """See ``BlockCodec.kernel``."""
        return triton_kernel("onebit", name, self.block_size)

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; a NaN or Inf makes its block's means non-finite."""
        above = not_negative(blocks)
        count = above.sum(1, keepdim=True) + (slab.real - blocks.shape[1])  # padding, which is zero, counts as above
        positive = blocks.clamp_min(0).sum(1, keepdim=True) / count.clamp_min(1)
        negative = blocks.clamp_max(0).sum(1, keepdim=True) / (slab.real - count).clamp_min(1)
        return {"values": above, "scales": torch.cat([positive, negative], 1)}

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        above, means = symbols["values"], symbols["scales"]
        return above * means[:, :1] + (1 - above) * means[:, 1:]

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        return {**symbols, "values": pack(symbols["values"], 1)}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``."""
        return {**codes, "values": unpack(codes["values"], 1).float()}


def not_negative(blocks: Tensor) -> Tensor:
    """1.0 where the sign bit is clear, else 0.0 (−0.0 counts as negative). Comparing would be several times slower."""
    return ((blocks.view(torch.int32) >> 31) + 1).float()
