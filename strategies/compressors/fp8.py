"""8-bit floating point with one scale per block."""

from typing import Literal, Self

import torch
from torch import Tensor

from strategies.compressors.blocks import TINY, BlockCodec, Slab

_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class FP8(BlockCodec):
    """Scale each block so that its largest magnitude is the largest float8, and cast; average in fp32.

    x̂ = fp8(x·F / max_B|x|)·max_B|x| / F with F = 448 (e4m3) or 57344 (e5m2); formats of Micikevicius et al.,
    arXiv 2209.05433. The error is relative to each element (2⁻⁴ or 2⁻³ at most), not to the block's maximum: better
    than int8 where magnitudes inside a block differ widely, worse where they do not. Biased (round to nearest).
    Bytes sent: N(1 + 4/B)(n−1)/n. (The 8 bits travel as uint8: gloo has no float8.)

    Args:
        format: "e4m3" (3 bits of mantissa) or "e5m2" (2 bits, wider range).
        block_size: Elements that share a scale; 0 is one scale per destination.
    """

    contractive = True

    def __init__(self, format: Literal["e4m3", "e5m2"] = "e4m3", block_size: int = 256) -> None:
        super().__init__(block_size)
        if format not in _FORMATS:
            raise ValueError(f"FP8.format must be one of {', '.join(_FORMATS)}; got {format!r}")
        self.format = format
        self._dtype = _FORMATS[format]
        self._largest = torch.finfo(self._dtype).max

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls("e4m3"), cls("e5m2")]

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block, torch.uint8), "scales": (1, torch.float32)}

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; a NaN or Inf makes its block's scale non-finite."""
        amax = blocks.abs().amax(1, keepdim=True)
        # clamp: the product may round to just above the largest float8, which casts to NaN or Inf
        scaled = (blocks * (self._largest / amax.clamp_min(TINY))).clamp(-self._largest, self._largest)
        return {"values": scaled.to(self._dtype), "scales": amax * (1 / self._largest)}

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        return symbols["values"].float() * symbols["scales"]

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        return {**symbols, "values": symbols["values"].view(torch.uint8)}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``."""
        return {**codes, "values": codes["values"].view(self._dtype)}
