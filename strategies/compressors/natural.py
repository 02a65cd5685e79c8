"""Natural compression: sign and exponent, the mantissa rounded away at random."""

import torch
from torch import Tensor

from strategies.compressors.blocks import BlockCodec, Slab

_LOWEST = 27  # biased float32 exponent that code 0 stands for: 2⁻¹⁰⁰ and below are sent as zero
_NONFINITE = 127  # the largest code: 2²⁷ and above, Inf, NaN


class NaturalCompression(BlockCodec):
    """Round every element to one of the two powers of two around it, at random so that the expectation is exact.

    |x| = 2ᵉ(1+m) becomes 2ᵉ⁺¹ with probability m, else 2ᵉ (Horváth et al., arXiv 1905.10988): add uniform bits below
    the exponent and drop the mantissa. Unbiased with E‖x̂ − x‖² ≤ ‖x‖²/8, so a contraction too. No scale, no statistics.
    Wire: sign and 7 bits of exponent. They cover 2⁻⁹⁹ … 2²⁶; less is sent as zero, more as Inf (the paper's 9 bits
    cover all of float32). Bytes sent: N(n−1)/n.
    """

    unbiased = contractive = True

    def __init__(self) -> None:
        super().__init__(block_size=1024)  # only how slabs are cut: blocks share nothing

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block, torch.uint8)}

    def encode_blocks(self, blocks: Tensor, out: dict[str, Tensor], slab: Slab) -> None:
        """See ``BlockCodec.encode_blocks``."""
        finite = blocks.isfinite()
        word = torch.where(finite, blocks, 0.0).view(torch.int32)
        exponent = ((word & 0x7FFFFFFF) + (slab.bits(blocks) & 0x7FFFFF)) >> 23
        code = torch.where(finite, (exponent - _LOWEST).clamp_(0, _NONFINITE), _NONFINITE)
        out["values"].copy_(((word >> 24) & 0x80) | code)

    def decode_blocks(self, payload: dict[str, Tensor], out: Tensor) -> None:
        """See ``BlockCodec.decode_blocks``."""
        word = payload["values"].to(torch.int32)
        code = word & 0x7F
        exponent = torch.where(code == _NONFINITE, 255, torch.where(code == 0, 0, code + _LOWEST))
        out.copy_(((exponent << 23) | ((word & 0x80) << 24)).view(torch.float32))
