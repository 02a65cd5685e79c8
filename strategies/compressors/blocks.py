"""Codecs that work on blocks of neighbouring elements: how a chunk is cut, and where each block's codes lie.

Shape legend: n rows (destinations), s elements of a row, b blocks at a time, B elements of a block.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.compressors import hashing
from strategies.compressors.base import Codec
from strategies.units import Unit

SLAB = 1 << 16  # elements processed at a time on CPU: a slab and its temporaries stay in a core's L2 cache
TINY = 1e-30  # keeps 1/max finite; far below any gradient that matters, and NaN passes through clamp_min


@dataclass(frozen=True)
class Slab:
    """Some blocks of one row, as ``encode_blocks`` sees them.

    Attributes:
        first: Position of the first element in the unit's flat gradient.
        key: Key of this rank's random numbers for this unit and step.
        valid: ``bool [b, B]``, false on padding; None when all elements are real, or the codec did not ask.
    """

    first: int
    key: tuple[int, int]
    valid: Tensor | None = None

    def uniform(self, like: Tensor) -> Tensor:
        """Random numbers in [0, 1) for the elements of ``like [b, B]``: a function of key and position only."""
        return hashing.uniform(self.first, like.shape, self.key, like.device)

    def bits(self, like: Tensor) -> Tensor:
        """32 random bits (int32) for the elements of ``like [b, B]``."""
        return hashing.random_bits(self.first, like.shape, self.key, like.device)


class BlockCodec(Codec):
    """A codec of blocks that do not know each other.

    Subclasses give the arithmetic of ``[b, B]`` tensors; this class cuts rows into slabs (on CPU a slab's temporaries
    stay in cache, several times faster than whole-tensor arithmetic; a GPU wants one launch) and lays out the payload:
    all blocks' codes, then the codes of the shorter block that ends a row.

    Class attributes:
        planes: Elements that share a byte; blocks are multiples of it, and a row's last block is padded to it.
        masked: ``encode_blocks`` needs ``Slab.valid``.

    Args:
        block_size: Elements that share statistics; 0 is one block per destination.
    """

    planes: int = 1
    masked: bool = False

    def __init__(self, block_size: int) -> None:
        name = type(self).__name__
        if block_size < 0:
            raise ValueError(f"{name}.block_size must be at least 1, or 0 for a whole chunk; got {block_size}")
        if block_size % self.planes:
            raise ValueError(
                f"{name}.block_size must be a multiple of {self.planes}, since {self.planes} elements share a byte; "
                f"got {block_size}, use {-(-block_size // self.planes) * self.planes}"
            )
        self.block_size = block_size

    @abstractmethod
    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """Entries and dtype by role that one block of ``block`` elements takes on the wire."""

    @abstractmethod
    def encode_blocks(self, blocks: Tensor, out: dict[str, Tensor], slab: Slab) -> None:
        """Write the codes of ``float32 [b, B]`` into ``out``, by role ``[b, entries]``."""

    @abstractmethod
    def decode_blocks(self, payload: dict[str, Tensor], out: Tensor) -> None:
        """Write ``float32 [b, B]`` into ``out`` from codes ``[b, entries]`` by role."""

    def entries(self, size: int) -> dict[str, int]:
        """Entries by role that a row of ``size`` elements takes on the wire."""
        whole, tail = self._cut(size)
        ends = self.layout(tail)
        blocks = self.layout(self.block_size) if whole else dict.fromkeys(ends, (0, torch.uint8))
        return {role: whole * blocks[role][0] + (ends[role][0] if tail else 0) for role in blocks}

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``."""
        n, size = chunks.shape
        dtypes = {role: dtype for role, (_, dtype) in self.layout(self.block_size or self.planes).items()}
        payload = {
            role: torch.empty(n, entries, dtype=dtypes[role], device=chunks.device)
            for role, entries in self.entries(size).items()
        }
        key = hashing.unit_key(unit)
        for row in range(n):
            for span, block, parts in self._slabs(size, payload, row):
                blocks, count = _blocks(chunks[row, span], block), span.stop - span.start
                first = row * size + span.start
                valid = self._valid(unit, first, count, blocks) if self.masked else None
                self.encode_blocks(blocks, parts, Slab(first, key, valid))
        return payload

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        some = next(iter(payload.values()))
        decoded = torch.empty(some.shape[0], size, dtype=torch.float32, device=some.device)
        for row in range(some.shape[0]):
            for span, block, parts in self._slabs(size, payload, row):
                out = decoded[row, span]
                if out.numel() % block == 0:
                    self.decode_blocks(parts, out.view(-1, block))
                else:  # the last block was padded to fill its bytes
                    padded = out.new_empty(1, block)
                    self.decode_blocks(parts, padded)
                    out.copy_(padded[0, : out.numel()])
        return decoded

    def _cut(self, size: int) -> tuple[int, int]:
        """Whole blocks in a row, and the length on the wire of its last, shorter block (0 when there is none)."""
        whole = size // self.block_size if self.block_size else 0
        rest = size - whole * self.block_size
        return whole, -(-rest // self.planes) * self.planes

    def _slabs(self, size: int, payload: dict[str, Tensor], row: int) -> Iterator[tuple[slice, int, dict[str, Tensor]]]:
        """Cut one row: its elements, their block length, and views ``[b, entries]`` of the row's payload."""
        whole, tail = self._cut(size)
        on_cpu = next(iter(payload.values())).device.type == "cpu"
        widths = {role: entries for role, (entries, _) in self.layout(self.block_size).items()} if whole else {}
        step = max(1, SLAB // self.block_size) if whole and on_cpu else max(1, whole)
        for first in range(0, whole, step):
            last = min(first + step, whole)
            parts = {
                role: payload[role][row, first * width : last * width].view(last - first, width)
                for role, width in widths.items()
            }
            yield slice(first * self.block_size, last * self.block_size), self.block_size, parts
        if tail:
            parts = {
                role: payload[role][row, whole * widths.get(role, 0) :][None, :entries]
                for role, (entries, _) in self.layout(tail).items()
            }
            yield slice(whole * self.block_size, size), tail, parts

    @staticmethod
    def _valid(unit: Unit, first: int, count: int, blocks: Tensor) -> Tensor | None:
        """Which elements of ``blocks`` are real; the first ``count`` lie at ``first`` in the flat gradient."""
        holes = unit.padding_within(first, first + count)
        if count < blocks.numel():
            holes = [*holes, (count, blocks.numel())]
        if not holes:
            return None
        valid = torch.ones(blocks.numel(), dtype=torch.bool, device=blocks.device)
        for start, stop in holes:
            valid[start:stop] = False
        return valid.view(blocks.shape)


def _blocks(values: Tensor, block: int) -> Tensor:
    """``[m]`` as ``float32 [b, block]``; the last block is filled up with zeros."""
    if values.numel() % block:
        values = torch.nn.functional.pad(values, (0, -values.numel() % block))
    return values.view(-1, block).float()
