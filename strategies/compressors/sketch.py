"""Sketched SGD: count sketches find the largest elements of the *mean* gradient, a second round fetches them."""

from typing import Self

import torch
from torch import Tensor

from strategies import transport
from strategies.compressors import hashing
from strategies.compressors.base import Compressor
from strategies.compressors.topk import check_density
from strategies.units import Unit


class Sketch(Compressor):
    """Sum count sketches at each shard's owner, let it pick the k elements that look largest, and send those exactly.

    Ivkin et al., arXiv 1903.04488. Each rank sketches every destination's chunk into ``rows`` × W counters; a sketch is
    linear, so the owner's mean of n sketches is the sketch of the mean. It estimates every element by the median over
    rows, takes the k = density·s largest, and tells all ranks, which send their exact values there. Unlike top-k, an
    element is chosen for its mean over ranks, not for its size on one of them. (The paper fetches P·k candidates and
    applies k of them; here all that were fetched are applied.) Biased; run it as ``ErrorFeedback(inner=Sketch())``.

    The hash of a row rotates each block of W elements by a random shift and multiplies by random signs (of block and
    column): sums of contiguous rows instead of scattered additions.
    Wire: sketches in fp32, k positions in int32 from every owner, k values in fp32. NaN or Inf anywhere in a chunk
    makes its values NaN. Bytes sent: 4(n−1)(rows·W + 2k) with W = width·s.

    Args:
        density: Share of elements to send, in (0, 1].
        rows: Independent hashes, odd.
        width: Counters in a row, as a share of the chunk's elements, in (0, 1].
    """

    contractive = True
    sparsifier = True

    def __init__(self, density: float = 0.01, rows: int = 3, width: float = 0.02) -> None:
        check_density("Sketch.density", density)
        check_density("Sketch.width", width)
        if rows < 1 or rows % 2 == 0:
            raise ValueError(f"Sketch.rows must be odd, for a median; got {rows}")
        self.density, self.rows, self.width = density, rows, width

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(0.1, width=0.1)]

    def columns(self, size: int) -> int:
        """Counters W in a row of a sketch of ``size`` elements."""
        return max(1, round(self.width * size))

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        traffic, n = unit.traffic, unit.world_size
        chunks = grad.view(n, -1).float()
        size = chunks.shape[1]
        with traffic.timed(unit.name, "encode", grad.device):
            tables = self.sketch(chunks, unit)
        received = transport.all_to_all({"tables": tables}, unit)["tables"]
        with traffic.timed(unit.name, "decode", grad.device):
            estimate = self.estimate(received.mean(0, keepdim=True), size, unit)[0]
            k = max(1, round(self.density * size))
            chosen = estimate.abs().topk(k).indices.to(torch.int32)
        every = torch.empty(n * k, dtype=torch.int32, device=grad.device)
        transport.all_gather(chosen, every, unit, "indices")
        positions = every.view(n, k).to(torch.int64)
        with traffic.timed(unit.name, "encode", grad.device):
            values = chunks.gather(1, positions)
            values += (chunks * 0).sum(1, keepdim=True)  # 0, or NaN when the chunk holds a NaN or Inf
            if sent is not None:
                sent.view(n, -1).zero_().scatter_(1, positions, values)
                unit.clear_padding(sent, 0)
        fetched = transport.all_to_all({"values": values}, unit)["values"]
        with traffic.timed(unit.name, "decode", grad.device):
            output.zero_().scatter_(0, positions[unit.rank], fetched.mean(0).to(output.dtype))
            unit.clear_padding(output, unit.rank * size)
        if traffic.sampling and traffic.fidelity is not None:
            traffic.fidelity.add(chunks, torch.zeros_like(chunks).scatter_(1, positions, values))

    def sketch(self, chunks: Tensor, unit: Unit) -> Tensor:
        """Counters ``[n, rows·W]`` of ``float32 [n, s]``; linear."""
        n, size = chunks.shape
        places, signs = self._hashes(size, unit, chunks.device)
        blocks = torch.nn.functional.pad(chunks, (0, signs[0].numel() - size)).view(n, *signs[0].shape)
        tables = [
            (blocks * sign).gather(2, place.expand(n, -1, -1)).sum(1) for place, sign in zip(places, signs, strict=True)
        ]
        return torch.cat(tables, 1)

    def estimate(self, tables: Tensor, size: int, unit: Unit) -> Tensor:
        """Estimated elements ``[n, size]`` from counters ``[n, rows·W]``: the median over rows."""
        n = tables.shape[0]
        places, signs = self._hashes(size, unit, tables.device)
        estimates = []
        for table, place, sign in zip(tables.view(n, self.rows, -1).unbind(1), places, signs, strict=True):
            spread = torch.empty(n, *place.shape, device=tables.device, dtype=torch.float32)
            spread.scatter_(2, place.expand(n, -1, -1), table[:, None].expand(n, *place.shape))
            estimates.append((spread * sign).view(n, -1)[:, :size])
        return torch.stack(estimates).median(0).values

    def _hashes(self, size: int, unit: Unit, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """For each row: the column of a block that falls on each counter, and the signs; both ``[blocks, W]``."""
        width = self.columns(size)
        blocks = -(-size // width)
        places, signs = [], []
        for row in range(self.rows):
            key = hashing.unit_key(unit, f"sketch {row}", shared=True)
            drawn = hashing.random_bits(0, torch.Size([2 * blocks + width]), key, device)
            shift = (drawn[:blocks] & 0x7FFFFFFF) % width
            places.append((torch.arange(width, device=device) + shift[:, None]) % width)
            sign = (drawn[blocks:] & 1).float() * 2 - 1
            signs.append(sign[:blocks, None] * sign[blocks:])
        return places, signs
