"""Natural compression: sign and exponent, the mantissa rounded away at random."""

from collections.abc import Callable

import torch
from torch import Tensor

from strategies.compressors.blocks import BlockCodec, Slab
from strategies.kernels import triton_kernel

_LOWEST = 27  # biased float32 exponent that code 0 stands for: 2⁻¹⁰⁰ and below are sent as zero
_INFINITY = 0x7F800000  # bits of float32 Inf; a NaN has more
_NONFINITE = 127  # the largest code: 2²⁷ and above, Inf, NaN


class NaturalCompression(BlockCodec):
    """Round every element to one of the two powers of two around it, at random so that the expectation is exact.

    |x| = 2ᵉ(1+m) becomes 2ᵉ⁺¹ with probability m, else 2ᵉ (Horváth et al., arXiv 1905.10988): add uniform bits below
    the exponent and drop the mantissa. Unbiased with E‖x̂ − x‖² ≤ ‖x‖²/8, so a contraction too. No scale, no statistics.
    Wire: sign and 7 bits of exponent. They cover 2⁻⁹⁹ … 2²⁶; less is sent as zero, more as Inf (the paper's 9 bits
    cover all of float32). Bytes sent: N(n−1)/n.
    """

    unbiased = contractive = draws = True

    def __init__(self) -> None:
        super().__init__(block_size=1024)  # only how slabs are cut: blocks share nothing

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block, torch.uint8)}

    def kernel(self, name: str) -> Callable[..., None] | None:
        """See ``BlockCodec.kernel``."""
        return triton_kernel("natural", name, self.block_size)

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``."""
        word = blocks.view(torch.int32)
        magnitude = (word & 0x7FFFFFFF).clamp_max(_INFINITY)  # NaN as Inf: nothing below may carry into the sign
        exponent = (magnitude + (slab.bits(blocks) & 0x7FFFFF)) >> 23
        return {"values": (exponent - _LOWEST).clamp(0, _NONFINITE) | ((word >> 24) & 0x80)}

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        word = symbols["values"].to(torch.int32)
        code = word & 0x7F
        # code 0 is zero, the largest is Inf; by arithmetic, since comparing is several times slower on a CPU
        largest = (code - (_NONFINITE - 1)).clamp_min(0)
        exponent = (code + _LOWEST + largest * (255 - _LOWEST - _NONFINITE)) * code.clamp_max(1)
        return ((exponent << 23) | ((word & 0x80) << 24)).view(torch.float32)
