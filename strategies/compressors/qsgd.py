"""QSGD: stochastic quantisation in units of the block's norm."""

import math
from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import TINY, BlockCodec, Slab
from strategies.compressors.packing import pack, unpack


class QSGD(BlockCodec):
    """Round |x|·L/‖x‖₂ up or down at random so that the expectation is exact.

    x̂ = ‖x‖₂·sign(x)·ξ, ξ ∈ {l/L, (l+1)/L} (Alistarh et al., arXiv 1610.02132). Unbiased, with
    E‖x̂ − x‖² ≤ ω‖x‖², ω = min(B/L², √B/L). Few levels mean ω > 1: noise larger than the gradient. Error feedback needs
    a contraction and gets it from ``shrink``, which multiplies by 1/(1+ω).
    Wire: one code in {−L…L} of 2, 4 or 8 bits (the smallest that fits 2L+1 values; no entropy coding), planar, and
    one fp32 norm per block. Bytes sent: N(b/8 + 4/B)(n−1)/n.

    Args:
        levels: Positive levels L, 1 to 127.
        block_size: Elements that share a norm, a multiple of 8/b; 0 is one norm per destination.
        shrink: Multiply by 1/(1+ω): biased, but safe under error feedback.
    """

    draws = True
    sums = True

    def __init__(self, levels: int = 127, block_size: int = 256, shrink: bool = False) -> None:
        if not 1 <= levels <= 127:
            raise ValueError(f"QSGD.levels must be 1 to 127 (a code has at most 8 bits), got {levels}")
        self._bits = 2 if levels == 1 else 4 if levels <= 7 else 8
        self.planes = 8 // self._bits
        super().__init__(block_size)
        self.levels, self.shrink = levels, shrink
        self.unbiased, self.contractive = not shrink, shrink

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(), cls(levels=7), cls(levels=1), cls(levels=7, shrink=True)]

    def for_feedback(self) -> Compressor:
        """The shrunk form; plain QSGD diverges under error feedback as soon as ω is large."""
        return type(self)(self.levels, self.block_size, shrink=True)

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block * self._bits // 8, torch.uint8), "scales": (1, torch.float32)}

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; a NaN or Inf makes its block's norm non-finite."""
        norm = torch.linalg.vector_norm(blocks, dim=1, keepdim=True)
        scaled = blocks * (self.levels / norm.clamp_min(TINY)) + slab.uniform(blocks)
        return {"values": scaled.floor().clamp(-self.levels, self.levels), "scales": norm}

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        omega = min(block / self.levels**2, math.sqrt(block) / self.levels) if self.shrink else 0.0
        return symbols["values"] * (symbols["scales"] / (self.levels * (1 + omega)))

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        return {**symbols, "values": pack(symbols["values"] + self.levels, self._bits)}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``."""
        return {**codes, "values": (unpack(codes["values"], self._bits) - self.levels).float()}
