"""PowerSGD: low-rank factors of every matrix, found by one warm-started power iteration a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies import transport
from strategies.compressors import hashing
from strategies.compressors.base import Compressor
from strategies.units import ParameterSlice, Unit


@dataclass(frozen=True)
class _Matrix:
    """A parameter of a flat gradient seen as ``[rows, columns]``."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.rows, self.columns)


class PowerSGD(Compressor):
    """Send P = orth(M·Q) and Q = Mᵀ·P for every matrix M; the mean gradient is P·Qᵀ.

    Vogels et al., arXiv 1905.13727. P and Q are averaged by two all-reduces, each over all of a unit's matrices, so
    every rank could rebuild all; a shard's owner rebuilds only its own rows. Q starts from the last step's (warm
    start), which turns single power iterations into a good approximation over time. Biased; run it as
    ``ErrorFeedback(inner=PowerSGD())``: Pᵀ·Mᵢ is what each rank contributes, so the residual is a projection error.

    Parameters with fewer than two dimensions, and matrices that factors would not make smaller (r(a+b) ≥ a·b, which is
    also every matrix smaller than the rank), go in fp32 with the first all-reduce.
    Bytes sent: 2·4·(Σ r(a+b) + dense elements)(n−1)/n. A NaN or Inf spreads over its whole matrix.

    Args:
        rank: Columns r of the factors.
    """

    contractive = True
    stateful = True

    def __init__(self, rank: int = 4) -> None:
        if rank < 1:
            raise ValueError(f"PowerSGD.rank must be at least 1, got {rank}")
        self.rank = rank

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        self._reduce(grad, output, unit.rank * output.numel(), unit, sent)

    def all_reduce(self, grad: Tensor, unit: Unit) -> None:
        """See ``Compressor.all_reduce``; every rank has both factors, so nothing is gathered."""
        output = torch.empty_like(grad)
        self._reduce(grad, output, 0, unit, None)
        grad.copy_(output)

    def split(self, unit: Unit, numel: int) -> tuple[list[_Matrix], list[tuple[int, int]]]:
        """The matrices worth factoring in a flat gradient, and the ranges of everything else but padding."""
        matrices, dense = [], []
        for parameter in unit.parameters or [ParameterSlice("", (numel,), 0)]:
            rows = parameter.shape[0] if parameter.shape else 1
            columns = parameter.numel // max(rows, 1)
            if len(parameter.shape) > 1 and self.rank * (rows + columns) < rows * columns:
                matrices.append(_Matrix(parameter.offset, rows, columns))
            else:
                dense.append((parameter.offset, parameter.offset + parameter.numel))
        return matrices, dense

    def _reduce(self, grad: Tensor, output: Tensor, start: int, unit: Unit, sent: Tensor | None) -> None:
        """Write elements ``start …`` of the mean gradient into ``output``."""
        traffic, exact = unit.traffic, grad.float()
        matrices, dense = self.split(unit, grad.numel())
        sampling = traffic.sampling and traffic.fidelity is not None
        if sampling and sent is None:
            sent = torch.empty_like(exact)
        with traffic.timed(unit.name, "encode", grad.device):
            old = self._warm_start(matrices, unit, grad.device)
            left = [matrix.of(exact) @ q for matrix, q in zip(matrices, old, strict=True)]
            first = torch.cat([*(p.flatten() for p in left), *(exact[a:b] for a, b in dense)])
        transport.all_reduce_mean(first, unit)
        with traffic.timed(unit.name, "encode", grad.device):
            *averaged, rest = first.split([*(p.numel() for p in left), sum(b - a for a, b in dense)])
            left = [torch.linalg.qr(p.view(like.shape)).Q for p, like in zip(averaged, left, strict=True)]
            right = [matrix.of(exact).T @ p for matrix, p in zip(matrices, left, strict=True)]
            if sent is not None:
                self._contribution(exact, sent, matrices, dense, left, right)
            second = torch.cat([q.flatten() for q in right]) if right else None
        if second is not None:
            transport.all_reduce_mean(second, unit)
        with traffic.timed(unit.name, "decode", grad.device):
            means = second.split([q.numel() for q in right]) if second is not None else ()
            right = [q.view(like.shape) for q, like in zip(means, right, strict=True)]
            if right:
                kept = [torch.where(q.isfinite().all(), q, o) for q, o in zip(right, old, strict=True)]
                unit.state["powersgd.q"] = torch.cat([q.flatten() for q in kept])
            _rebuild(output, start, matrices, left, right)
            _copy_ranges(rest, output, start, dense)
        if sampling and traffic.fidelity is not None and sent is not None:
            traffic.fidelity.add(exact[None], sent[None])

    def _warm_start(self, matrices: list[_Matrix], unit: Unit, device: torch.device) -> list[Tensor]:
        """Q ``[columns, r]`` of every matrix: the last step's, or the same random ones on every rank."""
        sizes = [matrix.columns * self.rank for matrix in matrices]
        flat = unit.state.get("powersgd.q")
        if flat is None:
            key = hashing.unit_key(unit, "powersgd", shared=True)
            flat = hashing.uniform(0, torch.Size([sum(sizes)]), key, device).sub_(0.5)
        return [q.view(-1, self.rank) for q in flat.split(sizes)] if matrices else []

    @staticmethod
    def _contribution(
        exact: Tensor,
        sent: Tensor,
        matrices: list[_Matrix],
        dense: list[tuple[int, int]],
        left: list[Tensor],
        right: list[Tensor],
    ) -> None:
        """What this rank adds to the mean: its own projection on the common P, and all of the dense elements."""
        sent.zero_()
        for matrix, p, q in zip(matrices, left, right, strict=True):
            torch.mm(p, q.T, out=matrix.of(sent))
        for a, b in dense:
            sent[a:b] = exact[a:b]


def _rebuild(output: Tensor, start: int, matrices: list[_Matrix], left: list[Tensor], right: list[Tensor]) -> None:
    """Write P·Qᵀ into ``output``, which begins at ``start`` of the flat gradient; only the rows that reach into it."""
    output.zero_()
    for matrix, p, q in zip(matrices, left, right, strict=True):
        first, stop = max(matrix.start, start), min(matrix.stop, start + output.numel())
        if first < stop:
            top = (first - matrix.start) // matrix.columns
            bottom = -(-(stop - matrix.start) // matrix.columns)
            rows = (p[top:bottom] @ q.T).flatten()
            skipped = first - matrix.start - top * matrix.columns
            output[first - start : stop - start] = rows[skipped : skipped + stop - first]


def _copy_ranges(packed: Tensor, output: Tensor, start: int, ranges: list[tuple[int, int]]) -> None:
    """Write the elements of ``ranges``, packed one after another, where they reach into ``output``."""
    position = 0
    for a, b in ranges:
        first, stop = max(a, start), min(b, start + output.numel())
        if first < stop:
            output[first - start : stop - start] = packed[position + first - a : position + stop - a]
        position += b - a
