"""signSGD: a bit per element, by majority vote or scaled."""

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.blocks import BlockCodec, Slab
from strategies.compressors.packing import pack, unpack
from strategies.units import Unit


class SignSGD(BlockCodec):
    """Send signs; the owner takes the majority, or the mean of signs scaled by each block's mean magnitude.

    * Majority vote: output sign(Σᵢ sign(gᵢ)), a *direction* of entries −1, 0 (tie), +1 (Bernstein et al.,
      arXiv 1802.04434 and 1810.05291). The size of the gradient is lost: choose the learning rate for it.
    * ``scaled``: x̂ = (‖x‖₁/B)·sign(x) per block, averaged (EF-SignSGD, Karimireddy et al., arXiv 1901.09847). This one
      is contractive, and is meant to run as ``ErrorFeedback(inner=SignSGD(scaled=True))``.

    Biased. sign(0) is +1, save in a block of zeros. Wire: 8 signs in a byte, planar, and an fp32 per block: the scale,
    or for the vote 1 (0 for a block of zeros; NaN when the block holds a NaN or Inf, which no sign could show).
    Bytes sent: N(1/8 + 4/B)(n−1)/n.

    Args:
        scaled: Scale by the mean magnitude instead of voting.
        block_size: Elements that share a scale, a multiple of 8; 0 is one per destination.
    """

    planes = 8
    masked = True

    def __init__(self, scaled: bool = False, block_size: int = 256) -> None:
        super().__init__(block_size)
        self.scaled = self.contractive = scaled

    @classmethod
    def examples(cls) -> list[Compressor]:
        """See ``Compressor.examples``."""
        return [cls(), cls(scaled=True)]

    def for_feedback(self) -> Compressor:
        """Only the scaled variant knows how much of the gradient it sent."""
        if not self.scaled:
            raise ValueError(
                "ErrorFeedback(inner=SignSGD()): a majority vote has no size, so there is no residual to speak of. "
                "Use SignSGD(scaled=True)."
            )
        return self

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        return {"values": (block // 8, torch.uint8), "scales": (1, torch.float32)}

    def encode_blocks(self, blocks: Tensor, out: dict[str, Tensor], slab: Slab) -> None:
        """See ``BlockCodec.encode_blocks``."""
        total = blocks.shape[1] if slab.valid is None else slab.valid.sum(1, keepdim=True).clamp_min(1)
        mean = blocks.abs().sum(1, keepdim=True) / total
        # mean − mean is 0, or NaN when the block is not finite
        out["scales"].copy_(mean if self.scaled else (mean > 0).float() + (mean - mean))
        out["values"].copy_(pack((blocks >= 0).to(torch.int32), 1))

    def decode_blocks(self, payload: dict[str, Tensor], out: Tensor) -> None:
        """See ``BlockCodec.decode_blocks``."""
        torch.mul(2 * unpack(payload["values"], 1) - 1, payload["scales"], out=out)

    def _mean(self, received: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        mean = super()._mean(received, size, unit)
        return mean if self.scaled else torch.where(mean.isfinite(), mean.sign(), mean)
