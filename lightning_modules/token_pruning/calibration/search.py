"""From what every layer needs to the schedule that reaches a speed-up with the most room to spare."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.schedule import Schedule

SURE = 0.95
"""Share of the answers that a layer must keep. The worst few would decide all with 1."""

_LAYERS = 12
"""Layers that are combined: those that need least for their depth."""


Heads = tuple[int, ...] | None
"""Heads that count, the greatest of them; None for all."""


@dataclass(frozen=True)
class Reading:
    """A way to read one layer's attention.

    Attributes:
        layer: The layer that attends; pruning is after the one before it.
        heads: Heads that count, the greatest of them; None for all.
        needed: Share of the context that had to stay, for every planted answer, float32 [answers].
    """

    layer: int
    heads: Heads
    needed: Tensor

    @property
    def share(self) -> float:
        """The share that keeps nearly every answer; a thousandth where what is protected anyway does."""
        return max(float(self.needed.quantile(SURE)), 1e-3)


@dataclass(frozen=True)
class Stages:
    """Where to prune and how much to keep there.

    Attributes:
        readings: One for each stage, first to last.
        keep: Share of the tokens that may be dropped which stays after each stage.
        room: By how much each share exceeds what its stage needs; below 1 answers are expected to be lost.
        window: Asking tokens.
        pool: Width of the mean over neighbours.
    """

    readings: tuple[Reading, ...]
    keep: tuple[float, ...]
    room: float
    window: int
    pool: int

    @property
    def kept(self) -> float:
        """Share of the planted answers that are expected to survive every stage."""
        survives = [reading.needed <= share for reading, share in zip(self.readings, self.keep, strict=True)]
        return float(torch.stack(survives).all(0).float().mean())


def best_readings(readings: Sequence[Reading]) -> list[Reading]:
    """For every layer the reading that needs least."""
    best: dict[int, Reading] = {}
    for reading in readings:
        if reading.layer not in best or reading.share < best[reading.layer].share:
            best[reading.layer] = reading
    return [best[layer] for layer in sorted(best)]


def schedules(
    readings: Sequence[Reading], cost: Cost, lengths: Sequence[int], speedup: float, frame: Schedule, window: int
) -> list[Stages]:
    """The schedules of one to three stages that reach a speed-up, the best first (see ``merit``).

    Every stage keeps its need times the same factor: a stage with less room than the others would lose its answers
    first. The factor, ``room``, is the largest that the speed-up allows.

    Args:
        readings: At most one a layer.
        cost: Of the model.
        lengths: Prompt lengths in tokens; the speed-up is reached at each of them.
        speedup: FLOP bound to reach.
        frame: What is protected, and the mean over neighbours.
        window: Asking tokens of these readings.
    """
    # an early layer may need more and still save more
    worth = sorted(readings, key=lambda reading: reading.layer * (1 - reading.share) + len(cost.linear) * reading.share)
    chosen = sorted(worth[:_LAYERS], key=lambda reading: reading.layer)
    found = []
    for count in (1, 2, 3):
        for stages in combinations(chosen, count):
            # a stage that needs no less than the one before it only loses
            if all(later.share < earlier.share for earlier, later in pairwise(stages)):
                made = _widest(stages, cost, lengths, speedup, frame, window)
                if made is not None and made.keep[0] < 1:  # a stage that drops nothing is none
                    found.append(made)
    return sorted(found, key=merit)


def merit(stages: Stages) -> tuple[float, float]:
    """Sorts the best first: those that are expected to keep most answers, and of them those with most room."""
    return -round(stages.kept, 2), -stages.room


def _widest(
    stages: tuple[Reading, ...], cost: Cost, lengths: Sequence[int], speedup: float, frame: Schedule, window: int
) -> Stages | None:
    """The largest factor on every stage's need, by bisection; None where nothing reaches the speed-up."""
    low, high = 0.0, 1.0 / min(reading.share for reading in stages)
    for _ in range(20):
        room = (low + high) / 2
        keep = _shares(stages, room)
        reached = min(cost.bound(n, framed(frame, [r.layer - 1 for r in stages], keep)) for n in lengths)
        low, high = (room, high) if reached >= speedup else (low, room)
    if low == 0.0:
        return None
    return Stages(stages, tuple(_shares(stages, low)), low, window, frame.pool or 1)


def _shares(stages: Sequence[Reading], room: float) -> list[float]:
    return [max(1e-6, min(1.0, room * reading.share)) for reading in stages]


def framed(frame: Schedule, layers: list[int], keep: list[float]) -> Schedule:
    """A schedule with these stages, and what ``frame`` protects."""
    return Schedule(
        layers=layers,
        keep=keep,
        sinks=frame.sinks,
        tail=frame.tail,
        min_tail=frame.min_tail,
        pool=frame.pool,
    )


def only(stages: Stages) -> dict[int, list[int]] | None:
    """The heads that count, as ``LastWindow`` takes them."""
    named: dict[int, Any] = {r.layer: list(r.heads) for r in stages.readings if r.heads is not None}
    return named or None
