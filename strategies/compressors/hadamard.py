"""Rotation before quantisation: outliers are spread over their neighbours."""

from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Codec, Compressor, Use
from strategies.compressors.int4 import Int4
from strategies.kernels import Job
from strategies.units import Unit


class Hadamard(Codec):
    """Rotate groups of neighbouring elements by a Hadamard matrix, then encode with ``inner``; rotate back on arrival.

    One large element in a block makes its scale, and with it every other element's error, large. Rotated, it is shared
    among ``size`` elements (SDP4Bit, arXiv 2410.15526, takes 32 before 4-bit codes). The rotation is orthogonal, so
    that ``inner`` keeps what it claims; on Gaussian values it changes nothing. A NaN or Inf reaches its whole group.
    Bytes sent: those of ``inner`` for rows filled up to a multiple of ``size``.

    Args:
        inner: The codec of the rotated elements.
        size: Elements that are rotated together: a power of two.

    Raises:
        ValueError: ``size`` is no power of two.
    """

    def __init__(self, inner: Codec, size: int = 32) -> None:
        if size < 2 or size & (size - 1):
            raise ValueError(f"Hadamard.size must be a power of two from 2 on, got {size}")
        self.inner, self.size = inner, size
        self.unbiased, self.contractive, self.linear = inner.unbiased, inner.contractive, inner.linear

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(Int4())]

    def for_feedback(self) -> Compressor:
        """Itself around the inner codec's form."""
        return type(self)(self.inner.for_feedback(), self.size)  # type: ignore[arg-type]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``; what is encoded is float32."""
        return self.inner.warm_up(Job(job.backend, job.device, job.ranks), "apart")

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``."""
        rows = torch.nn.functional.pad(chunks.float(), (0, -chunks.shape[1] % self.size))
        return self.inner.encode(self._rotated(rows), self._inside(unit, rows.numel()))

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        width = -(-size // self.size) * self.size
        rows = self.inner.decode(payload, width, self._inside(unit, width))
        return self._rotated(rows)[:, :size]

    def _rotated(self, rows: Tensor) -> Tensor:
        """Every group of ``rows [n, k·size]`` times the matrix, which is its own inverse."""
        turn = torch.ones(1, 1, dtype=torch.float32, device=rows.device)
        while turn.shape[0] < self.size:
            turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
        return (rows.reshape(-1, self.size) @ (turn * self.size**-0.5)).view(rows.shape)

    @staticmethod
    def _inside(unit: Unit, numel: int) -> Unit:
        """Rotated padding is none."""
        return unit.compact(numel, "rotated")
