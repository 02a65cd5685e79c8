"""Codecs that work on blocks of neighbouring elements: how a chunk is cut, and where each block's codes lie.

Shape legend: n rows (destinations), s elements of a row, b blocks at a time, B elements of a block.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from strategies.compressors import hashing
from strategies.compressors.base import Codec, Use
from strategies.compressors.rows import Region, real_elements
from strategies.compressors.steps import BlockSteps, Slab
from strategies.kernels import Job
from strategies.kernels.step import place_of
from strategies.units import Unit

TINY = 1e-30  # keeps 1/max finite; far below any gradient that matters, and NaN passes through clamp_min


class BlockCodec(Codec):
    """A codec of blocks that do not know each other.

    Subclasses give the arithmetic of ``[b, B]`` tensors as four functions: ``quantise`` and its inverse ``reconstruct``
    (what is lost is lost here), ``pack`` and its inverse ``unpack`` (symbols to bytes, exactly). They leave their
    arguments as they are, and do not look at values on the host. ``BlockSteps`` runs them. This class cuts rows and
    lays out the payload: all blocks' codes, then those of a shorter last block.

    Attributes (of the class, or of an instance whose arguments decide):
        planes: Elements that share a byte; blocks are multiples of it, and a row's last block is padded to it.
        masked: ``quantise`` needs ``Slab.real``.
        draws: ``quantise`` needs random numbers.
        sums: Statistics are sums, whose last digits depend on the order of summation.
        compilable: ``torch.compile`` has something to fuse.
        fuses: ``encode`` can take ``owed``: the codes are this class's own.

    Args:
        block_size: Elements that share statistics; 0 is one block per destination.
    """

    planes: int = 1
    masked: bool = False
    draws: bool = False
    sums: bool = False
    compilable: bool = True
    fuses: bool = True

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

    def __getstate__(self) -> dict[str, object]:
        """Without steps: another process makes and warms up its own."""
        return {name: value for name, value in vars(self).items() if name != "steps"}

    # What a codec is.

    @abstractmethod
    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """Entries and dtype by role that one block of ``block`` elements takes on the wire."""

    @abstractmethod
    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """Symbols of ``float32 [b, B]``. NaN and Inf must make what is reconstructed non-finite."""

    @abstractmethod
    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """``float32 [b, block]`` from symbols, as a new tensor."""

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """Symbols as ``layout`` has them, ``[b, entries]`` by role; any dtype that converts exactly."""
        return symbols

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """The inverse of ``pack``: symbols of ``[b, entries]`` by role."""
        return codes

    def conclude(self, mean: Tensor) -> Tensor:
        """What becomes of the ranks' mean ``[b, B]``; nothing here."""
        return mean

    # Rows and payloads.

    def entries(self, size: int) -> dict[str, int]:
        """Entries by role that a row of ``size`` elements takes on the wire."""
        whole, tail = self._cut(size)
        ends = self.layout(tail)
        blocks = self.layout(self.block_size) if whole else dict.fromkeys(ends, (0, torch.uint8))
        return {role: whole * blocks[role][0] + (ends[role][0] if tail else 0) for role in blocks}

    def encode(self, chunks: Tensor, unit: Unit, owed: Tensor | None = None) -> dict[str, Tensor]:
        """See ``Codec.encode``.

        Where ``owed float32 [n, s]`` is given, ``chunks + owed`` is compressed, and what the codes do not tell is left
        in ``owed``; where that is NaN or Inf, ``owed`` stays as it was.
        """
        n, size = chunks.shape
        dtypes = {role: dtype for role, (_, dtype) in self.layout(self.block_size or self.planes).items()}
        payload = {
            role: torch.empty(n, entries, dtype=dtypes[role], device=chunks.device)
            for role, entries in self.entries(size).items()
        }
        key = hashing.unit_key(unit)
        limit = self.steps.limit("encode" if owed is None else "owing", chunks.device)
        for row in range(n):
            for region in self._regions(size, limit):
                blocks, first = region.elements(chunks[row]), row * size + region.span.start
                rest = region.parts(payload, row, blocks.shape[0])
                if self.masked:
                    rest.append(real_elements(unit, first, region.span.stop - region.span.start, blocks))
                place = place_of((first, *key), chunks.device) if self.draws else None
                if owed is None:
                    self.steps.encode(place, blocks, *rest)
                else:
                    remaining = region.elements(owed[row])
                    self.steps.owing(place, blocks, remaining, *rest)
                    region.put(owed[row], remaining)
        return payload

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        some = next(iter(payload.values()))
        decoded = torch.empty(some.shape[0], size, dtype=torch.float32, device=some.device)
        limit = self.steps.limit("decode", some.device)
        for row in range(some.shape[0]):
            for region in self._regions(size, limit):
                out = region.elements(decoded[row])
                self.steps.decode(None, out, *region.parts(payload, row, out.shape[0]))
                region.put(decoded[row], out)
        return decoded

    def average(self, received: dict[str, Tensor], output: Tensor, unit: Unit) -> None:
        """See ``Codec.average``: decoding and adding in one pass."""
        if not self.fuses:
            super().average(received, output, unit)
            return
        for region in self._regions(output.numel(), self.steps.limit("mean", output.device)):
            out = region.elements(output)
            codes = [part for row in range(unit.world_size) for part in region.parts(received, row, out.shape[0])]
            self.steps.mean(None, out, *codes)
            region.put(output, out)

    def reduce_scatter_owing(self, grad: Tensor, owed: Tensor, output: Tensor, unit: Unit) -> None:
        """``reduce_scatter`` of ``grad + owed``; ``owed float32 [N]`` becomes what was not understood of it."""
        chunks = grad.view(unit.world_size, -1)
        with unit.traffic.timed(unit.name, "encode", grad.device):
            payload = self.encode(chunks, unit, owed.view(chunks.shape))
        self.deliver(payload, output, unit)

    def _cut(self, size: int) -> tuple[int, int]:
        """Whole blocks in a row, and the length on the wire of its last, shorter block (0 when there is none)."""
        whole = size // self.block_size if self.block_size else 0
        rest = size - whole * self.block_size
        return whole, -(-rest // self.planes) * self.planes

    def _regions(self, size: int, limit: int | None) -> Iterator[Region]:
        """Cut a row of ``size`` elements, whole blocks into regions of about ``limit`` elements."""
        whole, tail = self._cut(size)
        widths = [entries for entries, _ in self.layout(self.block_size).values()] if whole else []
        blocks = max(1, limit // self.block_size) if limit and whole else whole
        for first in range(0, whole, blocks or 1):
            last = min(first + blocks, whole)
            codes = [slice(first * width, last * width) for width in widths]
            yield Region(slice(first * self.block_size, last * self.block_size), self.block_size, codes)
        if tail:
            starts = [whole * width for width in widths] or [0] * len(self.steps.roles)
            ends = [start + entries for start, (entries, _) in zip(starts, self.layout(tail).values(), strict=True)]
            codes = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
            yield Region(slice(whole * self.block_size, size), tail, codes)

    # Preparing.

    @cached_property
    def steps(self) -> BlockSteps:
        """The arithmetic as it runs; every instance has its own."""
        return BlockSteps(self)

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``."""
        found = {backend for part in self.parts() for backend in part.warm_up(job, "apart")}
        return found | self.steps.warm_up(job, use if self.fuses else "apart")

    def kernel(self, name: str) -> Callable[..., None] | None:
        """The step of that name as a Triton kernel, called like the step; none here."""
        return None
