"""Another method for some parameters: small and one-dimensional ones dense, others by name."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.none_a2a import NoCompressionA2A
from strategies.units import ParameterSlice, Unit


@dataclass(frozen=True)
class _Group:
    """The elements of a unit that one method reduces, by destination: ranges ``[start, stop)`` of each chunk."""

    method: Compressor
    label: str
    ranges: list[list[tuple[int, int]]]

    @property
    def width(self) -> int:
        """Elements of the longest row; shorter rows are filled up with zeros, which travel too."""
        return max(sum(stop - start for start, stop in row) for row in self.ranges)


class ByParameter(Compressor):
    """Send small and one-dimensional parameters in fp32, parameters whose names match a rule by the rule's method, and
    the rest by ``inner``.

    Biases and norms are few and sensitive, and would distort the statistics of their neighbours in the flat gradient.
    Each group's elements are taken out of every destination's chunk, reduced on their own, and put back.
    Bytes sent: those of each group's method for rows as long as the group's longest one, since an all-to-all has equal
    rows: a group that lies unevenly over the shards pays for the unevenness, and it is counted.

    Args:
        inner: The method for all parameters without a rule.
        rules: Methods by pattern of the parameter's full name ("*.mlp.*"); the first that matches wins, also over the
            dense bypass.
        dense_below: Parameters with fewer elements than this go in fp32.
        dense_1d: One-dimensional parameters go in fp32.

    Raises:
        ValueError: A method keeps state; put it outside: ``ErrorFeedback(inner=ByParameter(…))``.
    """

    def __init__(
        self,
        inner: Compressor,
        rules: dict[str, Compressor] | None = None,
        dense_below: int = 1024,
        dense_1d: bool = True,
    ) -> None:
        if dense_below < 0:
            raise ValueError(f"ByParameter.dense_below must be 0 or more, got {dense_below}")
        self.inner, self.rules, self.dense_below, self.dense_1d = inner, rules, dense_below, dense_1d
        self._dense = NoCompressionA2A()
        methods = self._methods()
        for method in methods:
            if method.stateful:
                raise ValueError(
                    f"ByParameter({method!r}): a method with state belongs outside, as in "
                    "ErrorFeedback(inner=ByParameter(inner=…)); PowerSGD and GradiVeQ treat parameters apart themselves"
                )
        self.unbiased = all(method.unbiased for method in methods)
        self.contractive = all(method.contractive for method in methods)
        self.linear = all(method.linear for method in methods)
        self.sparsifier = any(method.sparsifier for method in methods)
        self._groups: dict[tuple[str, int, int], list[_Group]] = {}

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(Int8(), {"*second*": Int4()})]

    def for_feedback(self) -> Compressor:
        """Itself around its methods' forms."""
        rules = {pattern: method.for_feedback() for pattern, method in (self.rules or {}).items()}
        return type(self)(self.inner.for_feedback(), rules or None, self.dense_below, self.dense_1d)

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        groups = self._cut(unit, grad.numel())
        if len(groups) == 1:
            groups[0].method.reduce_scatter(grad, output, unit, sent)
            return
        n = unit.world_size
        chunks, understood = grad.view(n, -1), sent.view(n, -1) if sent is not None else None
        output.zero_()
        if sent is not None:
            sent.zero_()
        for group in groups:
            part = unit.compact(n * group.width, group.label)
            with unit.traffic.timed(unit.name, "encode", grad.device):
                taken = _take(chunks, group)
            shard = torch.empty(group.width, dtype=output.dtype, device=output.device)
            told = torch.empty(taken.numel(), device=grad.device, dtype=torch.float32) if sent is not None else None
            group.method.reduce_scatter(taken.view(-1), shard, part, told)
            with unit.traffic.timed(unit.name, "decode", grad.device):
                _put(shard, output, group.ranges[unit.rank])
                if told is not None and understood is not None:
                    for row, ranges in enumerate(group.ranges):
                        _put(told.view(n, -1)[row], understood[row], ranges)

    def _methods(self) -> list[Compressor]:
        return [self.inner, *(self.rules or {}).values()]

    def _choose(self, parameter: ParameterSlice) -> tuple[str, Compressor]:
        for pattern, method in (self.rules or {}).items():
            if fnmatchcase(parameter.fqn, pattern):
                return pattern, method
        if parameter.numel < self.dense_below or (self.dense_1d and len(parameter.shape) < 2):
            return "dense", self._dense
        return "inner", self.inner

    def _cut(self, unit: Unit, numel: int) -> list[_Group]:
        """The unit's groups, worked out once: they depend on names and shapes only."""
        key = (unit.name, unit.world_size, numel)
        if key not in self._groups:
            size = numel // unit.world_size
            found: dict[str, _Group] = {}
            for parameter in unit.parameters:
                named = ParameterSlice(unit.prefix + parameter.fqn, parameter.shape, parameter.offset)
                label, method = self._choose(named)
                group = found.setdefault(label, _Group(method, label, [[] for _ in range(unit.world_size)]))
                first, stop = parameter.offset, parameter.offset + parameter.numel
                for row in range(first // size, -(-stop // size)):
                    group.ranges[row].append((max(first - row * size, 0), min(stop - row * size, size)))
            self._groups[key] = list(found.values()) or [_Group(self.inner, "inner", [[(0, size)]] * unit.world_size)]
        return self._groups[key]


def _take(chunks: Tensor, group: _Group) -> Tensor:
    """The group's elements ``[n, width]`` of ``chunks [n, s]``."""
    taken = chunks.new_zeros(chunks.shape[0], group.width)
    for row, ranges in enumerate(group.ranges):
        position = 0
        for start, stop in ranges:
            taken[row, position : position + stop - start] = chunks[row, start:stop]
            position += stop - start
    return taken


def _put(row: Tensor, chunk: Tensor, ranges: list[tuple[int, int]]) -> None:
    """Write the elements of ``row [width]`` back to their ranges of ``chunk [s]``."""
    position = 0
    for start, stop in ranges:
        chunk[start:stop] = row[position : position + stop - start]
        position += stop - start
