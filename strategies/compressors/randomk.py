"""Random-k: elements that all ranks choose alike, so that no index travels."""

from typing import Self

import torch
from torch import Tensor

from strategies.compressors import hashing
from strategies.compressors.base import Codec, Compressor
from strategies.compressors.int8 import Int8
from strategies.compressors.topk import check_density, check_values
from strategies.units import Unit


class RandomK(Codec):
    """Send one random element of each of k equal strata of a chunk, k = max(1, round(density·s)).

    Random sparsification (Wangni et al., arXiv 1710.09854; Stich et al., arXiv 1809.07599) with the choice hashed from
    seed, step and unit: every rank takes the same coordinates, so only values travel, and codes can be summed (linear
    without ``values``). Strata in place of a permutation: no duplicates, and no cost per element that is not sent.
    ``scaled`` multiplies by the size of the stratum: unbiased, with a variance of 1/density − 1 times the gradient.
    Unscaled is biased and contractive, which error feedback needs (scaled diverges under it).
    Wire: k values (fp32, or what ``values`` makes of them). NaN or Inf anywhere in a chunk makes its values NaN.
    Bytes sent: 4·N·density·(n−1)/n.

    Args:
        density: Share of elements to send, in (0, 1].
        scaled: Multiply by 1/density, so that the expectation is exact.
        values: A codec for the values, e.g. ``Int8``; none sends fp32.
    """

    sparsifier = True

    def __init__(self, density: float = 0.01, scaled: bool = True, values: Codec | None = None) -> None:
        check_density("RandomK", density)
        check_values("RandomK", values)
        self.density, self.scaled, self.values = density, scaled, values
        self.unbiased = scaled and (values is None or values.unbiased)
        self.contractive = not scaled and (values is None or values.contractive)
        self.linear = values is None

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(0.1), cls(0.1, scaled=False), cls(0.1, scaled=False, values=Int8())]

    def for_feedback(self) -> Compressor:
        """The unscaled form."""
        values = self.values.for_feedback() if self.values is not None else None
        return type(self)(**{**self.arguments(), "scaled": False, "values": values})

    def kept(self, size: int) -> int:
        """Elements sent of a chunk of ``size``."""
        return max(1, round(self.density * size))

    def _choice(self, size: int, unit: Unit, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions ``int64 [k]`` in a chunk, ascending, and the sizes of their strata ``[k]``."""
        k = self.kept(size)
        bounds = torch.arange(k + 1, device=device) * size // k
        widths = bounds[1:] - bounds[:-1]
        key = hashing.unit_key(unit, "choice", shared=True)
        drawn = hashing.random_bits(0, widths.shape, key, device).to(torch.int64) & 0x7FFFFFFF
        return bounds[:-1] + drawn % widths, widths

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``: values ``float32 [n, k]``, or their codes."""
        positions, widths = self._choice(chunks.shape[1], unit, chunks.device)
        values = chunks[:, positions].float()
        if self.scaled:
            values *= widths
        values += (chunks.float() * 0).sum(1, keepdim=True)  # 0, or NaN when the chunk holds a NaN or Inf
        if self.values is None:
            return {"values": values}
        return self.values.encode(values, unit.compact(values.numel(), "values"))

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        if self.values is None:
            values = payload["values"]
        else:
            count = self.kept(size)
            values = self.values.decode(payload, count, unit.compact(count, "values"))
        positions, _ = self._choice(size, unit, values.device)
        decoded = torch.zeros(values.shape[0], size, device=values.device, dtype=torch.float32)
        decoded[:, positions] = values
        return decoded

    def average(self, received: dict[str, Tensor], output: Tensor, unit: Unit) -> None:
        """See ``Codec.average``: averages the codes, which all ranks took from the same places, and decodes once."""
        if not self.linear:
            super().average(received, output, unit)
            return
        codes = {role: part.mean(0, keepdim=True) for role, part in received.items()}
        output.copy_(self.decode(codes, output.numel(), unit)[0])
