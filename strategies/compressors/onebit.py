"""1-bit SGD: a bit per element, two means per block."""

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import BlockCodec, Slab
from strategies.compressors.packing import pack, unpack


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

    def __init__(self, block_size: int = 256) -> None:
        super().__init__(block_size)

    @classmethod
    def examples(cls) -> list[Compressor]:
        """See ``Compressor.examples``."""
        return [cls(), cls(block_size=0)]

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block // 8, torch.uint8), "scales": (2, torch.float32)}

    def encode_blocks(self, blocks: Tensor, out: dict[str, Tensor], slab: Slab) -> None:
        """See ``BlockCodec.encode_blocks``; a NaN or Inf makes its side's mean non-finite."""
        above = blocks >= 0  # NaN is not: it goes to the other side, and shows there
        counted = above if slab.valid is None else above & slab.valid
        total = blocks.shape[1] if slab.valid is None else slab.valid.sum(1, keepdim=True)
        count = counted.sum(1, keepdim=True)
        positive = torch.where(above, blocks, 0.0).sum(1, keepdim=True)
        negative = torch.where(above, 0.0, blocks).sum(1, keepdim=True)
        out["scales"][:, :1].copy_(positive / count.clamp_min(1))
        out["scales"][:, 1:].copy_(negative / (total - count).clamp_min(1))
        out["values"].copy_(pack(above.to(torch.int32), 1))

    def decode_blocks(self, payload: dict[str, Tensor], out: Tensor) -> None:
        """See ``BlockCodec.decode_blocks``."""
        means = payload["scales"]
        torch.where(unpack(payload["values"], 1) > 0, means[:, :1], means[:, 1:], out=out)
