"""Which stock shape costs least: a few that all remove the target are tried on a little text.

Every trial removes the same number of parameters: so many layers whole, so many groups of every other layer, and the
rest from the MLPs, to the very channel, so that no trial is flattered by rounding. All are tried by masks. A refit
makes up for channels far more than for whole layers, so what may be best is then sliced, refitted and tried again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_modules.structured_pruning.free import check_dropped
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.layout import AUTO, Layout
from lightning_modules.structured_pruning.stock import (
    check_class,
    check_expressible,
    check_in_reach,
    groups_for_share,
    in_reach,
    possible_groups,
    uniform_parts,
)

_SHARES = (0.0, 0.5, 1.0, 1.5)  # of the rate at which parameters go: what of the groups is tried to go
_LEAST = 2  # so many of the least losses by masks are tried again after a refit
MOST_CONTENDERS = _LEAST + 1


@dataclass(frozen=True)
class Candidate:
    """A stock shape that removes the target.

    Attributes:
        groups: Kept groups of every kept layer.
        channels: Kept channels of every kept layer.
        dropped: Layers that go whole.
    """

    groups: int
    channels: int
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A candidate and its losses in nats per token: by masks, and after a refit where it was tried so."""

    candidate: Candidate
    loss: float
    refitted: float | None = None

    def fields(self) -> dict[str, Any]:
        """For plans and records."""
        own = {"dropped": list(self.candidate.dropped), "loss": self.loss, "refitted": self.refitted}
        return {**asdict(self.candidate), **own}


def contenders(trials: Sequence[Trial]) -> list[Candidate]:
    """What is worth a refit: the least losses by masks, and the most groups of the most layers, which comes first."""
    ordered = sorted(trials, key=lambda trial: trial.loss)
    least = [trial.candidate for trial in ordered[:_LEAST]]
    return list(dict.fromkeys([trials[0].candidate, *least]))


class Space:
    """The stock shapes of a model that remove a target.

    Args:
        config: The model's configuration.
        shapes: Its layers.
        layout: What is asked.
        order: Layers that may be dropped, the least worth first; asked for only where layers are dropped.
        target: Parameters to remove from the decoder.
    """

    def __init__(
        self,
        config: Any,
        shapes: Sequence[LayerShape],
        layout: Layout,
        order: Callable[[], Sequence[int]],
        target: int,
    ) -> None:
        self.config, self.shapes, self.layout, self.target = config, shapes, layout, target
        self._order = order

    def dropped(self, count: int) -> tuple[int, ...]:
        """The layers that go when so many do."""
        return tuple(sorted(self._order()[:count])) if count else ()

    def drop_counts(self) -> list[int]:
        """How many layers to try to drop: the given number, or none, all that the target allows, and between."""
        if self.layout.dropped is not None:
            return [self.layout.dropped]
        largest = max(s.parameters for s in self.shapes)
        most = min(self.target // largest, len(self.layout.droppable(self.shapes)), len(self.shapes) - 1)
        return sorted({0, round(most / 3), round(2 * most / 3), most})

    def group_counts(self, dropped: Sequence[int]) -> list[int]:
        """Numbers of groups to try, most first, that the class can express and whose remainder channels make up."""
        kept, target = self.rest(dropped)
        multiple, share = self.layout.multiple, self.layout.attention_share
        reachable = [g for g in possible_groups(self.config, kept) if in_reach(kept, g, target, multiple)]
        if share != AUTO:
            asked = groups_for_share(kept, share, target, multiple)
            return [g for g in reachable if g == asked]
        if not reachable:
            return []
        most = max(s.groups for s in kept)
        rate = target / sum(s.parameters for s in kept)
        wanted = (most * (1 - share * rate) for share in _SHARES)
        return sorted({min(reachable, key=lambda g: abs(g - number)) for number in wanted}, reverse=True)

    def rest(self, dropped: Sequence[int]) -> tuple[list[LayerShape], int]:
        """The layers that stay, and what is to go of them."""
        kept = [shape for i, shape in enumerate(self.shapes) if i not in dropped]
        return kept, self.target - sum(self.shapes[i].parameters for i in dropped)

    def candidate(self, groups: int, dropped: tuple[int, ...], multiple: int = 1) -> Candidate:
        """The shape of so many groups whose channels make up the rest."""
        kept, target = self.rest(dropped)
        keep = uniform_parts(kept, groups, target, multiple)[0]
        return Candidate(groups, keep.channels, dropped)

    def most_trials(self) -> int:
        """How many trials there are at most."""
        drops = self.drop_counts()
        others = [len(self.group_counts(tuple(self.layout.droppable(self.shapes)[:n]))) - 1 for n in drops]
        return len(drops) + max(others[0], 0) + (max(0, *others[1:]) if len(drops) > 1 else 0)

    def search(
        self, loss: Callable[[Candidate], float], refitted: Callable[[Candidate], float] | None = None
    ) -> tuple[Candidate, list[Trial]]:
        """The candidate of least loss.

        First every number of dropped layers with the most groups, then fewer groups: with the fewest dropped layers,
        and with the best number of them.

        Args:
            loss: Loss of the model in a candidate's shape; not asked where there is only one candidate.
            refitted: The same after a refit, asked of contenders; None where that is not what follows.

        Returns:
            The best candidate, in channels of ``layout.multiple``, and what was tried.
        """
        counts = {dropped: self.group_counts(dropped) for dropped in map(self.dropped, self.drop_counts())}
        counts = {dropped: groups for dropped, groups in counts.items() if groups}
        trials: list[Trial] = []

        def tried(candidates: Iterable[Candidate]) -> Candidate:
            trials.extend(Trial(one, loss(one)) for one in candidates)
            return min(trials, key=lambda trial: trial.loss).candidate

        fewest = next(iter(counts))
        best = self.candidate(counts[fewest][0], fewest)
        if sum(map(len, counts.values())) > 1:
            best = tried(self.candidate(groups[0], dropped) for dropped, groups in counts.items())
            for dropped in dict.fromkeys((fewest, best.dropped)):
                best = tried(self.candidate(groups, dropped) for groups in counts[dropped][1:])
        again = contenders(trials) if refitted and trials else []
        if refitted and len(again) > 1:
            losses = {candidate: refitted(candidate) for candidate in again}
            trials = [replace(trial, refitted=losses.get(trial.candidate)) for trial in trials]
            best = min(losses, key=losses.__getitem__)
        return self.candidate(best.groups, best.dropped, self.layout.multiple), trials


def check_stock(config: Any, shapes: Sequence[LayerShape], layout: Layout, target: int) -> None:
    """Refuse a target that no stock shape removes, and a shape that the family's class cannot express.

    Raises:
        ValueError: The message says what can be removed, or which number of groups is nearest.
    """
    alike = layout.droppable(shapes)  # which of them go does not matter here
    space = Space(config, shapes, layout, lambda: alike, target)
    if layout.dropped:
        check_dropped([shapes[i] for i in alike[: layout.dropped]], target)
    choices = [space.dropped(count) for count in space.drop_counts()]
    if layout.attention_share != AUTO:
        kept, rest = space.rest(choices[0])
        groups = groups_for_share(kept, layout.attention_share, rest, layout.multiple)
        check_expressible(config, kept, groups, layout.attention_share, rest)
    if any(space.group_counts(dropped) for dropped in choices):
        return
    kept, rest = space.rest(choices[-1])
    numbers = check_class(config, kept)
    if layout.attention_share != AUTO:
        numbers = [groups_for_share(kept, layout.attention_share, rest, layout.multiple)]
    check_in_reach(kept, numbers, rest, layout.multiple)
