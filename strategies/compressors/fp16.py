"""float16 on the wire with a power-of-two scale, fp32 arithmetic."""

import torch
from torch import Tensor

from strategies.compressors.base import Codec
from strategies.units import Unit

_TARGET = 2.0**15  # half of the float16 range: rounding up can never overflow


class FP16(Codec):
    """Send the gradient as float16, scaled so that the largest magnitude of each destination's chunk is near 2¹⁵.

    Raw gradients underflow in float16 (its smallest subnormal is 6·10⁻⁸); a power-of-two scale moves them into range
    without any rounding of its own. Relative error at most 2⁻¹¹ for values within a factor 2²⁸ of the largest.
    Bytes sent: (2N + 16n)(n−1)/n.
    """

    contractive = True

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``."""
        exact = chunks.float()
        amax = exact.abs().amax(1, keepdim=True)
        # clamp: an all-zero chunk has no scale of its own, and fp32 exponents end at ±126. NaN passes through.
        scale = torch.exp2(torch.floor(torch.log2(_TARGET / amax)).clamp(-126, 126))
        scale = torch.where(torch.isfinite(amax), scale, amax)  # Inf or NaN: poison the whole chunk, visibly
        return {"values": (exact * scale).to(torch.float16), "scales": scale}

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        return payload["values"].to(torch.float32) / payload["scales"]
