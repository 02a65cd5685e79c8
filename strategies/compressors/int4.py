"""Symmetric 4-bit quantisation with one scale per block, two elements in a byte."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import BlockCodec, Slab
from strategies.compressors.int8 import to_levels
from strategies.compressors.packing import pack, unpack
from strategies.kernels import triton_kernel

_LEVELS = 7.0


class Int4(BlockCodec):
    """Round each block of B gradients to 15 levels between −max|x| and max|x|; average in fp32.

    q = round(7·x / max_B|x|), x̂ = q·max_B|x| / 7: the INT4 gradient reduction of ZeRO++ (arXiv 2306.10209) within one
    level. Biased (round to nearest); unbiased with ``stochastic``, at twice the squared error.
    Wire: q + 8 in 4 bits, planar (byte c holds elements c and c + B/2), one fp32 scale per block.
    Bytes sent: N(1/2 + 4/B)(n−1)/n.

    Args:
        block_size: Elements that share a scale, even; 0 is one scale per destination.
        stochastic: Round up with the probability that makes the expectation exact.
    """

    planes = 2

    def __init__(self, block_size: int = 128, stochastic: bool = False) -> None:
        super().__init__(block_size)
        self.stochastic = self.unbiased = self.draws = stochastic
        self.contractive = not stochastic  # a step of error on every element of a long block can exceed its norm

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(), cls(stochastic=True)]

    def for_feedback(self) -> Compressor:
        """Round to nearest: error feedback removes the bias and needs the smaller error."""
        return type(self)(self.block_size)

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block // 2, torch.uint8), "scales": (1, torch.float32)}

    def kernel(self, name: str) -> Callable[..., None] | None:
        """See ``BlockCodec.kernel``."""
        return None if self.stochastic else triton_kernel("int4", name, self.block_size)

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; a NaN or Inf makes its block's scale non-finite."""
        return to_levels(blocks, _LEVELS, slab if self.stochastic else None)

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        return symbols["values"].float() * symbols["scales"]

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        return {**symbols, "values": pack(symbols["values"] + 8, 4)}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``."""
        return {**codes, "values": (unpack(codes["values"], 4) - 8).float()}
