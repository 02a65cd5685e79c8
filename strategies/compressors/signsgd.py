"""signSGD: a bit per element, by majority vote or scaled."""

from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import BlockCodec, Slab
from strategies.compressors.onebit import not_negative
from strategies.compressors.packing import pack, unpack


class SignSGD(BlockCodec):
    """Send signs; the owner takes the majority, or the mean of signs scaled by each block's mean magnitude.

    * Majority vote: output sign(Σᵢ sign(gᵢ)), a *direction* of entries −1, 0 (tie), +1 (Bernstein et al.,
      arXiv 1802.04434 and 1810.05291). The size of the gradient is lost: choose the learning rate for it.
    * ``scaled``: x̂ = (‖x‖₁/B)·sign(x) per block, averaged (EF-SignSGD, Karimireddy et al., arXiv 1901.09847). This one
      is contractive, and is meant to run as ``ErrorFeedback(inner=SignSGD(scaled=True))``.

    Biased. sign(0) is +1, save in a block of zeros. Wire: 8 signs in a byte, planar, and an fp32 per block: the scale,
    or for the vote 1 (0 for a block of zeros; NaN when the block holds a NaN or Inf, which no sign could show).
    Bytes sent: N(1/8 + 4/B)(n−1)/n.

    Args:
        scaled: Scale by the mean magnitude instead of voting.
        block_size: Elements that share a scale, a multiple of 8; 0 is one per destination.
    """

    planes = 8
    masked = True
    sums = True

    def __init__(self, scaled: bool = False, block_size: int = 256) -> None:
        super().__init__(block_size)
        self.scaled = self.contractive = scaled

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(), cls(scaled=True)]

    def for_feedback(self) -> Compressor:
        """Only the scaled variant knows how much of the gradient it sent."""
        if not self.scaled:
            raise ValueError(
                "ErrorFeedback(inner=SignSGD()): a majority vote has no size, so there is no residual to speak of. "
                "Use SignSGD(scaled=True)."
            )
        return self

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block // 8, torch.uint8), "scales": (1, torch.float32)}

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``."""
        mean = blocks.abs().sum(1, keepdim=True) / slab.real.clamp_min(1)
        # mean − mean is 0, or NaN when the block is not finite
        scale = mean if self.scaled else (mean > 0).float() + (mean - mean)
        return {"values": not_negative(blocks), "scales": scale}

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        return (symbols["values"] * 2 - 1) * symbols["scales"]

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        return {**symbols, "values": pack(symbols["values"], 1)}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``."""
        return {**codes, "values": unpack(codes["values"], 1).float()}

    def conclude(self, mean: Tensor) -> Tensor:
        """See ``BlockCodec.conclude``: the majority, where there was a vote."""
        return mean if self.scaled else torch.where(mean.isfinite(), mean.sign(), mean)
