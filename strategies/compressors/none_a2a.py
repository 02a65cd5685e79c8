"""No compression, the compressed methods' own transport: what the all-to-all pattern alone costs or saves."""

from torch import Tensor

from strategies.compressors.base import Codec
from strategies.units import Unit


class NoCompressionA2A(Codec):
    """The gradient in fp32 through the all-to-all that every codec uses.

    The fair baseline for a codec: same collective, same averaging, only the bytes differ. Bytes sent: 4N(n−1)/n, which
    is half of what gloo's native reduce-scatter sends.
    """

    unbiased = contractive = linear = True

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``."""
        return {"values": chunks}

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``; always a new tensor, because the caller averages into it."""
        return payload["values"].float().clone()
