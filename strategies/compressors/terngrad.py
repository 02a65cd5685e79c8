"""TernGrad: −1, 0 or +1 times the block's largest magnitude."""

import math
from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import TINY, BlockCodec, Slab
from strategies.compressors.packing import pack, unpack


class TernGrad(BlockCodec):
    """Send max_B|x|·sign(x) with probability |x| / max_B|x|, else 0.

    Wen et al., arXiv 1705.07878 (there per layer). Unbiased; E‖x̂‖² = max|x|·‖x‖₁ ≤ √B·‖x‖², so ω = √B − 1: noise
    several times the gradient, which ``clip`` (the paper's 2.5 σ) tames at the price of a bias. ``shrink`` multiplies
    by 1/(1+ω), which error feedback needs.
    Wire: 2 bits an element, planar, and one fp32 scale per block. Bytes sent: N(1/4 + 4/B)(n−1)/n.

    Args:
        block_size: Elements that share a scale, a multiple of 4; 0 is one scale per destination.
        clip: Clip to this many root mean squares of the block first; 0 does not clip.
        shrink: Multiply by 1/(1+ω): biased, but safe under error feedback.
    """

    planes = 4
    draws = True

    def __init__(self, block_size: int = 256, clip: float = 0.0, shrink: bool = False) -> None:
        super().__init__(block_size)
        if clip < 0:
            raise ValueError(f"TernGrad.clip must be positive, or 0 for none; got {clip}")
        self.clip, self.shrink, self.sums = clip, shrink, clip > 0
        self.unbiased, self.contractive = not (clip or shrink), shrink

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(), cls(clip=2.5), cls(shrink=True)]

    def for_feedback(self) -> Compressor:
        """The shrunk form."""
        return type(self)(self.block_size, self.clip, shrink=True)

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block // 4, torch.uint8), "scales": (1, torch.float32)}

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; a NaN or Inf makes its block's scale non-finite."""
        if self.clip:
            limit = self.clip * blocks.square().mean(1, keepdim=True).sqrt()
            blocks = torch.minimum(torch.maximum(blocks, -limit), limit)  # NaN passes through
        amax = blocks.abs().amax(1, keepdim=True)
        signs = (blocks / amax.clamp_min(TINY) + slab.uniform(blocks)).floor().clamp(-1, 1)
        return {"values": signs, "scales": amax}

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        return symbols["values"] * (symbols["scales"] / (math.sqrt(block) if self.shrink else 1.0))

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        return {**symbols, "values": pack(symbols["values"] + 1, 2)}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``."""
        return {**codes, "values": (unpack(codes["values"], 2) - 1).float()}
