"""Bits where they matter: each unit's codec chosen by its measured error, so that all units keep to a byte budget."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from strategies import transport
from strategies.compressors.base import Codec, Compressor, Use
from strategies.compressors.bf16 import BF16
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.onebit import OneBit
from strategies.kernels import Job
from strategies.units import Unit

_CHOICE = "choice"


class Adaptive(Compressor):
    """Reduce every unit by one of several codecs, so that the total error is least for the bytes that may be sent.

    Every ``every`` steps all codecs encode each unit's gradient once. Their squared errors, summed over ranks in rank
    order, decide for the next steps, on all ranks that reduce together: beginning with the fewest bytes, the unit and
    codec that save most error for a byte come next, while the budget lasts (CGX, Markov et al., arXiv 2111.08617,
    chooses bits of layers in this sense). Until the first measurement all units have the best codec that the budget has
    bytes for. Choices are saved with checkpoints; on another number of ranks they are measured anew.

    Bytes sent: at most ``budget`` bits an element, each rank's part of (n−1)/n; and 8 bytes a codec, unit and other
    rank whenever errors are measured.

    Args:
        budget: Bits that an element may take on the wire, scales included; the mean over all units.
        every: Optimizer steps between measurements.
        choices: The codecs; by default ``OneBit``, ``Int4``, ``Int8`` and ``BF16``.

    Raises:
        ValueError: ``every`` is less than 1, or there is no choice; before training, if the budget is less than the
            codec of the fewest bytes takes.
    """

    stateful = True

    def __init__(self, budget: float, every: int = 100, choices: list[Codec] | None = None) -> None:
        if every < 1:
            raise ValueError(f"Adaptive.every must be at least 1 step, got {every}")
        if choices is not None and not choices:
            raise ValueError("Adaptive.choices is empty: leave it out, or give codecs")
        self.budget, self.every, self.choices = budget, every, choices
        self._codecs: list[Codec] = [OneBit(), Int4(), Int8(), BF16()] if choices is None else list(choices)
        self.unbiased = all(codec.unbiased for codec in self._codecs)
        self.contractive = all(codec.contractive for codec in self._codecs)
        self._units: dict[str, Unit] = {}
        self._errors: dict[str, Tensor] = {}  # of the measurement under way, on their device until all are there
        self._read: dict[str, tuple[Tensor, int]] = {}  # choices as numbers, beside the state that they are read from
        self._rows: dict[tuple[int, str], list[int]] = {}

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(8.0, choices=[Int4(), Int8()])]

    def parts(self) -> list[Compressor]:
        """See ``Compressor.parts``."""
        return list(self._codecs)

    def for_feedback(self) -> Compressor:
        """Itself around its codecs' forms."""
        forms = [codec.for_feedback() for codec in self._codecs]
        return type(self)(self.budget, self.every, None if self.choices is None else forms)  # type: ignore[arg-type]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``; errors are measured by decoding."""
        uses: tuple[Use, ...] = ("reduce", "apart")
        return {backend for codec in self._codecs for each in uses for backend in codec.warm_up(job, each)}

    def meet(self, units: list[Unit]) -> None:
        """See ``Compressor.meet``.

        Raises:
            ValueError: The budget is less than the fewest bytes.
        """
        self._units, self._errors = {unit.name: unit for unit in units}, {}
        sizes = {unit.name: -(-unit.numel // unit.world_size) for unit in units}
        least = sum(min(self._row_bytes(unit, sizes[unit.name])) for unit in units)
        if least > self._allowed(sum(sizes.values())):
            raise ValueError(
                f"Adaptive.budget={self.budget:g} bits an element is less than the least of its codecs takes for this "
                f"model, {8 * least / sum(sizes.values()):.3g}: give at least that, or codecs of fewer bits"
            )

    def chosen(self) -> dict[str, str]:
        """The codec of every unit."""
        return {unit.name: self._codecs[self._choice(unit, unit.numel)].name for unit in self._units.values()}

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        codec = self._codecs[self._choice(unit, grad.numel())]
        if unit.step % self.every == 0 and unit.name in self._units:
            self._measure(grad, unit)
        codec.reduce_scatter(grad, output, unit, sent)

    def _choice(self, unit: Unit, numel: int) -> int:
        """The place of a unit's codec; read from the state only when that is new, as after a resume."""
        kept = unit.state.get(_CHOICE)
        if kept is not None:
            if unit.name not in self._read or self._read[unit.name][0] is not kept:
                self._read[unit.name] = kept, int(kept)
            return self._read[unit.name][1]
        size = -(-numel // unit.world_size)
        rows = self._row_bytes(unit, size)
        fitting = [place for place, nbytes in enumerate(rows) if nbytes <= self._allowed(size)]
        if not fitting:
            fitting = [place for place, nbytes in enumerate(rows) if nbytes == min(rows)]
        return max(fitting, key=lambda place: (rows[place], place))

    def _allowed(self, size: int) -> float:
        """Bytes that rows of ``size`` elements in all may take."""
        return self.budget / 8 * size

    def _row_bytes(self, unit: Unit, size: int) -> list[int]:
        """Bytes that each codec makes of a row of ``size`` elements: of one without memory."""
        key = size, unit.name
        if key not in self._rows:
            row, part = torch.empty(1, size, device="meta"), unit.compact(size, "row")
            self._rows[key] = [transport.row_bytes(codec.encode(row, part)) for codec in self._codecs]
        return self._rows[key]

    def _measure(self, grad: Tensor, unit: Unit) -> None:
        """All codecs' squared errors on this unit, over all ranks; with those of all units, choose."""
        with unit.traffic.timed(unit.name, "encode", grad.device):
            chunks = grad.view(unit.world_size, -1)
            own = torch.stack([self._error(codec, chunks, unit) for codec in self._codecs]).double()
        every = torch.empty(unit.world_size * own.numel(), dtype=own.dtype, device=own.device)
        transport.all_gather(own, every, unit, "tables")
        self._errors[unit.name] = every.view(unit.world_size, -1).sum(0)
        if self._errors.keys() >= self._units.keys():
            self._choose()

    @staticmethod
    def _error(codec: Codec, chunks: Tensor, unit: Unit) -> Tensor:
        apart = unit.compact(chunks.numel(), "measured")
        apart.padding = unit.padding
        decoded = codec.decode(codec.encode(chunks, apart), chunks.shape[1], apart)
        return decoded.sub_(chunks).square_().sum()

    def _choose(self) -> None:
        names = sorted(self._units)
        errors, self._errors = torch.stack([self._errors[name] for name in names]).tolist(), {}  # the only wait
        sizes = [-(-self._units[name].numel // self._units[name].world_size) for name in names]
        rows = [self._row_bytes(self._units[name], size) for name, size in zip(names, sizes, strict=True)]
        if not all(math.isfinite(error) for row in errors for error in row):
            return  # a step that is skipped
        for name, place in zip(names, least_error(errors, rows, self._allowed(sum(sizes))), strict=True):
            self._units[name].state[_CHOICE] = torch.tensor(place)
            self._read[name] = self._units[name].state[_CHOICE], place


def least_error(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float) -> list[int]:
    """Which of its choices each thing gets, so that the sum of errors is small and that of sizes at most ``budget``.

    Greedy: from the smallest on, the change that saves most error for its size, while one fits. Of changes that are
    equally good the first.

    Args:
        errors: By thing and choice.
        sizes: The same.
        budget: At least the sum of the smallest.
    """
    chosen = [min(range(len(size)), key=lambda place: (size[place], place)) for size in sizes]
    left = budget - sum(size[place] for size, place in zip(sizes, chosen, strict=True))
    while True:
        best, found = 0.0, None
        for thing, now in enumerate(chosen):
            for place, size in enumerate(sizes[thing]):
                more, saved = size - sizes[thing][now], errors[thing][now] - errors[thing][place]
                if saved > 0 and more <= left and (worth := saved / max(more, 1e-9)) > best:
                    best, found = worth, (thing, place, more)
        if found is None:
            return chosen
        chosen[found[0]] = found[1]
        left -= found[2]
