"""Codecs that work on blocks of neighbouring elements: how a chunk is cut, and where each block's codes lie.

Shape legend: n rows (destinations), s elements of a row, b blocks at a time, B elements of a block.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from strategies import residuals
from strategies.compressors import hashing
from strategies.compressors.base import Codec, Use
from strategies.compressors.rows import Region, real_elements
from strategies.kernels import Job, Step, step
from strategies.kernels.step import Place, place_of
from strategies.units import Unit

TINY = 1e-30  # keeps 1/max finite; far below any gradient that matters, and NaN passes through clamp_min
_EXAMPLE = 64  # blocks that a warm-up tries


class Slab:
    """What ``BlockCodec.quantise`` may know of its blocks besides their elements."""

    def __init__(self, place: Place, real: Tensor | None) -> None:
        self._place, self._real = place, real

    @property
    def real(self) -> Tensor:
        """Elements of each block that are no padding, ``float32 [b, 1]``; padding is zero."""
        if self._real is None:
            raise RuntimeError("a codec that asks for padding must say so: masked = True")
        return self._real

    def bits(self, like: Tensor) -> Tensor:
        """32 random bits (int32) for each element of ``like [b, B]``: a function of key and position only."""
        if self._place is None:
            raise RuntimeError("a codec that draws random numbers must say so: draws = True")
        first, one, two = self._place
        b, block = like.shape
        position = torch.arange(b * block, dtype=torch.int32, device=like.device).view(b, block) + first
        return hashing.hash32(position, (one, two))

    def uniform(self, like: Tensor) -> Tensor:
        """Random numbers in [0, 1) for the elements of ``like``; see ``bits``."""
        return hashing.to_uniform(self.bits(like))


class BlockCodec(Codec):
    """A codec of blocks that do not know each other.

    Subclasses give the arithmetic of ``[b, B]`` tensors as four functions: ``quantise`` and its inverse ``reconstruct``
    (what is lost is lost here), ``pack`` and its inverse ``unpack`` (symbols to bytes, exactly). They leave their
    arguments as they are, and do not look at values on the host. This class makes steps of them (see
    ``strategies.kernels``), cuts rows, and lays out the payload: all blocks' codes, then those of a shorter last block.

    Attributes (of the class, or of an instance whose arguments decide):
        planes: Elements that share a byte; blocks are multiples of it, and a row's last block is padded to it.
        masked: ``quantise`` needs ``Slab.real``.
        draws: ``quantise`` needs random numbers.
        sums: Statistics are sums, whose last digits depend on the order of summation.
        compilable: ``torch.compile`` has something to fuse.
        fuses: ``encode_owing`` is possible: the codes are this class's own.

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
        return {name: value for name, value in vars(self).items() if not isinstance(value, Step)}

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

    # The steps. Roles come in ``layout``'s order; ``real`` is there for codecs that are masked.

    @step
    def encode_step(self, place: Place, blocks: Tensor, *rest: Tensor) -> None:
        """Codes of ``blocks [b, B]``."""
        symbols = self.quantise(blocks.float(), Slab(place, rest[-1] if self.masked else None))
        self._write(symbols, rest, blocks.shape[1])

    @step
    def owing_step(self, place: Place, grad: Tensor, owed: Tensor, *rest: Tensor) -> None:
        """Codes of ``grad + owed``, and what they lose into ``owed``: error feedback in one pass."""
        corrected = grad.float() + owed
        symbols = self.quantise(corrected, Slab(place, rest[-1] if self.masked else None))
        self._write(symbols, rest, grad.shape[1])
        residuals.settle(corrected.sub_(self.reconstruct(symbols, grad.shape[1])), owed)

    @step
    def decode_step(self, place: Place, out: Tensor, *codes: Tensor) -> None:
        """``out [b, B]`` from one rank's codes."""
        out.copy_(self._read(codes, out.shape[1]))

    @step
    def mean_step(self, place: Place, out: Tensor, *codes: Tensor) -> None:
        """``out [b, B]``, the mean over ranks, in rank order, from all ranks' codes one after another."""
        roles = len(self._roles())
        total = self._read(codes[:roles], out.shape[1])
        for first in range(roles, len(codes), roles):
            total += self._read(codes[first : first + roles], out.shape[1])
        out.copy_(self.conclude(total.mul_(roles / len(codes))))

    def _roles(self) -> list[str]:
        return list(self.layout(self.block_size or self.planes))

    def _write(self, symbols: dict[str, Tensor], rest: tuple[Tensor, ...], block: int) -> None:
        codes = self.pack(symbols, block)
        for role, out in zip(self._roles(), rest, strict=False):
            out.copy_(codes[role])

    def _read(self, codes: tuple[Tensor, ...], block: int) -> Tensor:
        return self.reconstruct(self.unpack(dict(zip(self._roles(), codes, strict=True)), block), block)

    # Rows and payloads.

    def entries(self, size: int) -> dict[str, int]:
        """Entries by role that a row of ``size`` elements takes on the wire."""
        whole, tail = self._cut(size)
        ends = self.layout(tail)
        blocks = self.layout(self.block_size) if whole else dict.fromkeys(ends, (0, torch.uint8))
        return {role: whole * blocks[role][0] + (ends[role][0] if tail else 0) for role in blocks}

    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """See ``Codec.encode``."""
        return self._encode(chunks, None, unit)

    def encode_owing(self, chunks: Tensor, owed: Tensor, unit: Unit) -> dict[str, Tensor]:
        """Compress ``chunks + owed``, both ``[n, s]``, and leave in ``owed`` what the codes do not tell.

        Where that is NaN or Inf, ``owed`` stays as it was.
        """
        return self._encode(chunks, owed, unit)

    def _encode(self, chunks: Tensor, owed: Tensor | None, unit: Unit) -> dict[str, Tensor]:
        n, size = chunks.shape
        dtypes = {role: dtype for role, (_, dtype) in self.layout(self.block_size or self.planes).items()}
        payload = {
            role: torch.empty(n, entries, dtype=dtypes[role], device=chunks.device)
            for role, entries in self.entries(size).items()
        }
        key = hashing.unit_key(unit)
        for row in range(n):
            for region in self._regions(size):
                blocks, first = region.elements(chunks[row]), row * size + region.span.start
                rest = region.parts(payload, row, blocks.shape[0])
                if self.masked:
                    rest.append(real_elements(unit, first, region.span.stop - region.span.start, blocks))
                origin = (first, *key) if self.draws else None
                if owed is None:
                    self.encode_step(origin, blocks, *rest)
                else:
                    remaining = region.elements(owed[row])
                    self.owing_step(origin, blocks, remaining, *rest)
                    region.put(owed[row], remaining)
        return payload

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        some = next(iter(payload.values()))
        decoded = torch.empty(some.shape[0], size, dtype=torch.float32, device=some.device)
        for row in range(some.shape[0]):
            for region in self._regions(size):
                out = region.elements(decoded[row])
                self.decode_step(None, out, *region.parts(payload, row, out.shape[0]))
                region.put(decoded[row], out)
        return decoded

    def average(self, received: dict[str, Tensor], output: Tensor, unit: Unit) -> None:
        """See ``Codec.average``: decoding and adding in one pass."""
        if not self.fuses:
            super().average(received, output, unit)
            return
        for region in self._regions(output.numel()):
            out = region.elements(output)
            codes = [part for row in range(unit.world_size) for part in region.parts(received, row, out.shape[0])]
            self.mean_step(None, out, *codes)
            region.put(output, out)

    def reduce_scatter_owing(self, grad: Tensor, owed: Tensor, output: Tensor, unit: Unit) -> None:
        """``reduce_scatter`` of ``grad + owed``; ``owed float32 [N]`` becomes what was not understood of it."""
        chunks = grad.view(unit.world_size, -1)
        with unit.traffic.timed(unit.name, "encode", grad.device):
            payload = self.encode_owing(chunks, owed.view(chunks.shape), unit)
        self.deliver(payload, output, unit)

    def _cut(self, size: int) -> tuple[int, int]:
        """Whole blocks in a row, and the length on the wire of its last, shorter block (0 when there is none)."""
        whole = size // self.block_size if self.block_size else 0
        rest = size - whole * self.block_size
        return whole, -(-rest // self.planes) * self.planes

    def _regions(self, size: int) -> Iterator[Region]:
        """Cut a row of ``size`` elements."""
        whole, tail = self._cut(size)
        widths = [entries for entries, _ in self.layout(self.block_size).values()] if whole else []
        if whole:
            yield Region(slice(0, whole * self.block_size), self.block_size, [slice(0, whole * w) for w in widths])
        if tail:
            starts = [whole * width for width in widths] or [0] * len(self._roles())
            ends = [start + entries for start, (entries, _) in zip(starts, self.layout(tail).values(), strict=True)]
            codes = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
            yield Region(slice(whole * self.block_size, size), tail, codes)

    # Preparing.

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``."""
        found = {backend for part in self.parts() for backend in part.warm_up(job, "apart")}
        use = use if self.fuses else "apart"
        if not (self.compilable and self.block_size):
            job = replace(job, backend="reference" if job.backend == "reference" else "slabs")
        origin = (1 << 20, *hashing.splitmix(0)) if self.draws else None
        for name, example in self._examples(job, use).items():
            one: Step = getattr(self, name)
            kernel = self.kernel(name) if job.backend == "triton" else None
            one.warm(job, example, origin if name in ("encode_step", "owing_step") else None, kernel, self.sums)
            found.add(str(one.backend))
        return found

    def kernel(self, name: str) -> Callable[..., None] | None:
        """The step of that name as a Triton kernel, called like the step; none here."""
        return None

    def _examples(self, job: Job, use: Use) -> dict[str, tuple[Tensor, ...]]:
        """Arguments of each step that ``use`` needs: gradients of very different sizes, and zeros."""
        block = self.block_size or self.planes
        draw = torch.Generator().manual_seed(0)
        sizes = torch.logspace(-6, 1, _EXAMPLE)[:, None]
        sizes[1] = 0
        real = [torch.full((_EXAMPLE, 1), float(block), device=job.device)] if self.masked else []

        def gradient() -> Tensor:
            return (torch.randn(_EXAMPLE, block, generator=draw) * sizes).to(job.device, job.dtype)

        def codes() -> list[Tensor]:
            out = [
                torch.empty(_EXAMPLE, entries, dtype=dtype, device=job.device)
                for entries, dtype in self.layout(block).values()
            ]
            place = place_of((0, *hashing.splitmix(1)) if self.draws else None, job.device)
            self.encode_step.reference(place, gradient(), *out, *real)
            return out

        out = torch.zeros(_EXAMPLE, block, dtype=job.dtype, device=job.device)
        encoded = (*codes(), *real)
        examples: dict[str, tuple[Tensor, ...]] = {
            "encode_step": (gradient(), *encoded),
            "owing_step": (gradient(), gradient().float(), *encoded),
            "decode_step": (out.float(), *codes()),
            "mean_step": (out, *(part for _ in range(job.ranks) for part in codes())),
        }
        needed = {"reduce": ("encode_step", "mean_step"), "owing": ("owing_step", "mean_step")}
        return {name: examples[name] for name in needed.get(use, ("encode_step", "decode_step"))}
