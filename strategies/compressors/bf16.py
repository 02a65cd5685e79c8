"""bfloat16 on the wire, fp32 arithmetic."""

import torch
from torch import Tensor

from strategies.compressors.base import Codec
from strategies.units import Unit


class BF16(Codec):
    """Send the gradient rounded to bfloat16 (8 significant bits, the range of fp32); average in fp32.

    A 16-bit *reduction*, as in ``reduce_dtype=bfloat16``, rounds again at every hop; here each value is rounded once.
    Round to nearest: no overflow, relative error at most 2⁻⁹. Bytes sent: 2N(n−1)/n.
    """

    contractive = True

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``."""
        return {"values": chunks.to(torch.bfloat16)}

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        return payload["values"].to(torch.float32)
