"""Symmetric 8-bit quantisation with one scale per block."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import TINY, BlockCodec, Slab
from strategies.kernels import triton_kernel

_LEVELS = 127.0


class Int8(BlockCodec):
    """Round each block of B gradients to 255 levels between −max|x| and max|x|; average in fp32.

    q = round(127·x / max_B|x|), x̂ = q·max_B|x| / 127 (block-wise absmax quantisation, Dettmers et al.,
    arXiv 2110.02861). Biased (round to nearest), error at most max_B/254 per element; unbiased with ``stochastic``, at
    twice the squared error. A scale per block rather than per tensor: gradients of different layers differ by orders of
    magnitude.
    Bytes sent: N(1 + 4/B)(n−1)/n.

    Args:
        block_size: Elements that share a scale; 0 is one scale per destination.
        stochastic: Round up with the probability that makes the expectation exact.
    """

    def __init__(self, block_size: int = 256, stochastic: bool = False) -> None:
        super().__init__(block_size)
        self.stochastic = self.unbiased = self.draws = stochastic
        self.contractive = not stochastic  # a step of error on every element of a long block can exceed its norm

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(), cls(stochastic=True), cls(block_size=0)]

    def for_feedback(self) -> Compressor:
        """Round to nearest: error feedback removes the bias and needs the smaller error."""
        return type(self)(self.block_size)

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block, torch.int8), "scales": (1, torch.float32)}

    def kernel(self, name: str) -> Callable[..., None] | None:
        """See ``BlockCodec.kernel``."""
        return None if self.stochastic else triton_kernel("int8", name, self.block_size)

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; a NaN or Inf makes its block's scale non-finite."""
        return to_levels(blocks, _LEVELS, slab if self.stochastic else None)

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        return symbols["values"].float() * symbols["scales"]


def to_levels(blocks: Tensor, levels: float, slab: Slab | None) -> dict[str, Tensor]:
    """Whole numbers ("values" ``float32 [b, B]``) in units of max/levels ("scales" ``[b, 1]``).

    Rounded to nearest, or stochastically when a ``slab`` is given.
    """
    amax = blocks.abs().amax(1, keepdim=True)
    scaled = blocks * (levels / amax.clamp_min(TINY))
    values = scaled.round_() if slab is None else (scaled + slab.uniform(blocks)).floor().clamp(-levels, levels)
    # times the reciprocal: what CUDA makes of a division by a constant, so that all backends agree in every bit
    return {"values": values, "scales": amax * (1 / levels)}
