"""The arithmetic of a block codec as four steps: what each computes, how it runs, and how that is settled.

Shape legend: b blocks, B elements of a block.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from strategies import residuals
from strategies.compressors import hashing
from strategies.compressors.base import Use
from strategies.kernels import Job, faster
from strategies.kernels.step import SLAB, Backend, Place, Reference, place_of

if TYPE_CHECKING:
    from strategies.compressors.blocks import BlockCodec

_EXAMPLE = 64  # blocks that a warm-up tries
_NEEDED: dict[Use, tuple[str, str]] = {
    "reduce": ("encode", "mean"),
    "owing": ("owing", "mean"),
    "apart": ("encode", "decode"),
}


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


class BlockSteps:
    """The steps of one codec.

    A step is called as ``step(place, *tensors)``. The tensors are ``[b, …]`` with one b, contiguous, the first
    ``[b, B]``; results are written into some of them. Codes come by role, in ``layout``'s order; behind them stands
    ``Slab.real`` for codecs that are masked. ``place`` says what random numbers are drawn from; see ``Place``.

    Args:
        codec: Whose arithmetic it is.

    Attributes:
        encode: ``(place, blocks, *codes)``: codes of ``blocks [b, B]``.
        owing: ``(place, grad, owed, *codes)``: codes of ``grad + owed``, and what they lose into ``owed``.
        decode: ``(None, out, *codes)``: ``out [b, B]`` from one rank's codes.
        mean: ``(None, out, *codes)``: ``out [b, B]``, the mean over ranks from all ranks' codes one after another.
        references: The same four by name, as written here. They are the specification, and what runs until ``warm_up``
            finds another way with the same results.
        backends: How each step that was warmed up runs.
    """

    def __init__(self, codec: "BlockCodec") -> None:
        self.codec = codec
        self.roles = list(codec.layout(codec.block_size or codec.planes))
        self.encode: Reference = self._encode
        self.owing: Reference = self._owing
        self.decode: Reference = self._decode
        self.mean: Reference = self._mean
        self.references: dict[str, Reference] = {
            "encode": self.encode,
            "owing": self.owing,
            "decode": self.decode,
            "mean": self.mean,
        }
        self.backends: dict[str, Backend] = {}

    def limit(self, name: str, device: torch.device) -> int | None:
        """Elements that the step wants at a time; None takes all. A GPU wants one launch."""
        return SLAB if device.type == "cpu" and self.backends.get(name, "slabs") == "slabs" else None

    # What is computed.

    def _encode(self, place: Place, blocks: Tensor, *rest: Tensor) -> None:
        symbols = self.codec.quantise(blocks.float(), Slab(place, rest[-1] if self.codec.masked else None))
        self._write(symbols, rest, blocks.shape[1])

    def _owing(self, place: Place, grad: Tensor, owed: Tensor, *rest: Tensor) -> None:
        corrected = grad.float() + owed
        symbols = self.codec.quantise(corrected, Slab(place, rest[-1] if self.codec.masked else None))
        self._write(symbols, rest, grad.shape[1])
        residuals.settle(corrected.sub_(self.codec.reconstruct(symbols, grad.shape[1])), owed)

    def _decode(self, place: Place, out: Tensor, *codes: Tensor) -> None:
        out.copy_(self._read(codes, out.shape[1]))

    def _mean(self, place: Place, out: Tensor, *codes: Tensor) -> None:
        roles = len(self.roles)
        total = self._read(codes[:roles], out.shape[1])
        for first in range(roles, len(codes), roles):
            total += self._read(codes[first : first + roles], out.shape[1])
        out.copy_(self.codec.conclude(total.mul_(roles / len(codes))))

    def _write(self, symbols: dict[str, Tensor], rest: tuple[Tensor, ...], block: int) -> None:
        codes = self.codec.pack(symbols, block)
        for role, out in zip(self.roles, rest, strict=False):
            out.copy_(codes[role])

    def _read(self, codes: tuple[Tensor, ...], block: int) -> Tensor:
        named = dict(zip(self.roles, codes, strict=True))
        return self.codec.reconstruct(self.codec.unpack(named, block), block)

    # How it runs.

    def warm_up(self, job: Job, use: Use) -> set[str]:
        """Settle how to run the steps that ``use`` needs; the backends they have afterwards."""
        codec = self.codec
        if not (codec.compilable and codec.block_size):
            job = replace(job, backend="reference" if job.backend == "reference" else "slabs")
        for name, example in self.examples(job, use).items():
            place = place_of(self._origin(1 << 20) if name in ("encode", "owing") else None, job.device)
            kernel: Callable[..., None] | None = codec.kernel(name) if job.backend == "triton" else None
            run, self.backends[name] = faster(
                self.references[name], f"{codec!r}.{name}", job, example, place, kernel, codec.sums
            )
            setattr(self, name, run)
        return {self.backends[name] for name in _NEEDED[use]}

    def examples(self, job: Job, use: Use) -> dict[str, tuple[Tensor, ...]]:
        """Arguments of each step that ``use`` needs: gradients of very different sizes, and zeros."""
        codec = self.codec
        block = codec.block_size or codec.planes
        draw = torch.Generator().manual_seed(0)
        sizes = torch.logspace(-6, 1, _EXAMPLE, dtype=torch.float32)[:, None]
        sizes[1] = 0
        full = torch.full((_EXAMPLE, 1), float(block), dtype=torch.float32, device=job.device)
        real = [full] if codec.masked else []

        def gradient() -> Tensor:
            return (torch.randn(_EXAMPLE, block, generator=draw, dtype=torch.float32) * sizes).to(job.device, job.dtype)

        def codes() -> list[Tensor]:
            out = [
                torch.empty(_EXAMPLE, entries, dtype=dtype, device=job.device)
                for entries, dtype in codec.layout(block).values()
            ]
            self._encode(place_of(self._origin(0, 1), job.device), gradient(), *out, *real)
            return out

        out = torch.zeros(_EXAMPLE, block, dtype=job.dtype, device=job.device)
        encoded = (*codes(), *real)
        examples: dict[str, tuple[Tensor, ...]] = {
            "encode": (gradient(), *encoded),
            "owing": (gradient(), gradient().float(), *encoded),
            "decode": (out.float(), *codes()),
            "mean": (out, *(part for _ in range(job.ranks) for part in codes())),
        }
        return {name: examples[name] for name in _NEEDED[use]}

    def _origin(self, first: int, key: int = 0) -> tuple[int, int, int] | None:
        return (first, *hashing.splitmix(key)) if self.codec.draws else None
