"""Symmetric 8-bit quantisation with one scale per block."""

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import TINY, BlockCodec, Slab

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
        self.stochastic = self.unbiased = stochastic
        self.contractive = not stochastic  # a step of error on every element of a long block can exceed its norm

    @classmethod
    def examples(cls) -> list[Compressor]:
        """See ``Compressor.examples``."""
        return [cls(), cls(stochastic=True), cls(block_size=0)]

    def for_feedback(self) -> Compressor:
        """Round to nearest: error feedback removes the bias and needs the smaller error."""
        return type(self)(self.block_size)

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block, torch.int8), "scales": (1, torch.float32)}

    def encode_blocks(self, blocks: Tensor, out: dict[str, Tensor], slab: Slab) -> None:
        """See ``BlockCodec.encode_blocks``; a NaN or Inf makes its block's scale non-finite."""
        amax = blocks.abs().amax(1, keepdim=True)
        out["scales"].copy_(amax / _LEVELS)
        out["values"].copy_(quantise(blocks, amax, _LEVELS, slab if self.stochastic else None))

    def decode_blocks(self, payload: dict[str, Tensor], out: Tensor) -> None:
        """See ``BlockCodec.decode_blocks``."""
        torch.mul(payload["values"], payload["scales"], out=out)


def quantise(blocks: Tensor, amax: Tensor, levels: float, slab: Slab | None) -> Tensor:
    """``[b, B]`` in units of ``amax / levels``, rounded to nearest, or stochastically when a ``slab`` is given."""
    scaled = blocks * (levels / amax.clamp_min(TINY))
    if slab is None:
        return scaled.round_()
    return scaled.add_(slab.uniform(blocks)).floor_().clamp_(-levels, levels)
