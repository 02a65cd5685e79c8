"""Symmetric 8-bit quantisation with one scale per block."""

from collections.abc import Iterator

import torch
from torch import Tensor

from strategies.compressors.base import Codec
from strategies.units import Unit

_LEVELS = 127.0
_SLAB = 1 << 16  # elements processed at a time: a slab and its temporaries stay in a core's L2 cache
_TINY = 1e-30  # keeps 127/max finite; far below any gradient that matters, and NaN passes through clamp_min


class Int8(Codec):
    """Round each block of B gradients to 255 levels between −max|x| and max|x|; average in fp32.

    q = round(127·x / max_B|x|), x̂ = q·max_B|x| / 127 (block-wise absmax quantisation, Dettmers et al.,
    arXiv 2110.02861). Biased (round to nearest), error at most max_B/254 per element. A scale per block rather than per
    tensor: gradients of different layers differ by orders of magnitude.
    Bytes sent: N(1 + 4/B)(n−1)/n.

    Args:
        block_size: Elements that share a scale.
    """

    contractive = True

    def __init__(self, block_size: int = 256) -> None:
        if block_size < 1:
            raise ValueError(f"Int8.block_size must be at least 1, got {block_size}")
        self.block_size = block_size

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``: codes ``int8 [n, s]`` and scales ``float32 [n, ⌈s/B⌉]``."""
        n, size = chunks.shape
        codes = torch.empty(n, size, dtype=torch.int8, device=chunks.device)
        scales = torch.empty(n, -(-size // self.block_size), dtype=torch.float32, device=chunks.device)
        for row in range(n):
            for blocks, code, scale in self._slabs(chunks[row], codes[row], scales[row]):
                _quantise(blocks, code, scale)
        return {"values": codes, "scales": scales}

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        codes, scales = payload["values"], payload["scales"]
        decoded = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for row in range(codes.shape[0]):
            for out, code, scale in self._slabs(decoded[row], codes[row], scales[row]):
                torch.mul(code, scale, out=out)
        return decoded

    def _slabs(self, values: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Cut one row into slabs of whole blocks ``[b, B]`` (and ``[b, 1]`` of scales), the ragged end last.

        On CPU a slab's temporaries stay in cache, which is several times faster than whole-tensor arithmetic; a GPU
        wants one launch.
        """
        block, size = self.block_size, values.numel()
        whole = size // block
        step = max(1, _SLAB // block) if values.device.type == "cpu" else max(1, whole)
        for first in range(0, whole, step):
            last = min(first + step, whole)
            span = slice(first * block, last * block)
            yield values[span].view(-1, block), codes[span].view(-1, block), scales[first:last, None]
        if size % block:
            yield values[whole * block :][None], codes[whole * block :][None], scales[whole:, None]


def _quantise(blocks: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write ``codes [b, B]`` and ``scales [b, 1]`` of ``blocks [b, B]``; a NaN or Inf makes its scale non-finite."""
    exact = blocks.float()
    amax = exact.abs().amax(1, keepdim=True)
    scales.copy_(amax / _LEVELS)
    codes.copy_((exact * (_LEVELS / amax.clamp_min(_TINY))).round_())
