"""How many parameters must go, and whole numbers of parts that remove just so many."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from lightning_modules.structured_pruning.footprint import Footprint, parameters_of
from lightning_modules.structured_pruning.importance.base import Keep
from lightning_modules.structured_pruning.layers import LayerShape

BudgetUnit = Literal["decoder", "parameters", "bytes"]
_LARGEST_MULTIPLE = 64  # channels: tensor cores and 16×16 blocks stay aligned
_FEWEST_STEPS = 8  # a small MLP must still have so many widths to choose from


class Removal(NamedTuple):
    """What is to go of one layer, in parts that need not be whole.

    Attributes:
        groups: Groups of heads.
        channels: MLP channels.
    """

    groups: float
    channels: float


def removed_parameters(amount: float, unit: BudgetUnit, dense: Footprint) -> int:
    """Parameters to remove.

    Args:
        amount: The budget: for "decoder" the share of decoder parameters to remove, in (0, 1); for "parameters" and
            "bytes" what the whole model may keep.
        unit: What ``amount`` counts.
        dense: Costs of the whole model.

    Raises:
        ValueError: A budget that removes nothing, or more than there is; the message says what is possible.
    """
    if unit == "decoder":
        if not 0 < amount < 1:
            raise ValueError(f"budget: a share of decoder parameters to remove lies between 0 and 1, got {amount}")
        return round(amount * dense.decoder_parameters)
    whole = dense.parameters if unit == "parameters" else dense.weight_bytes
    smallest = whole * (1 - dense.decoder_parameters / dense.parameters)
    if not smallest < amount < whole:
        raise ValueError(
            f"budget: {amount:,.0f} {unit} cannot be met; the model has {whole:,} and its decoder layers are all that "
            f"can shrink, so the budget must lie between {smallest:,.0f} and that"
        )
    return round((whole - amount) * dense.parameters / whole)


def channel_multiple(shapes: Sequence[LayerShape], multiple: int | None) -> int:
    """The number that kept channels are a multiple of: the given one, or the largest power of two that suits all.

    Raises:
        ValueError: The given one is larger than a layer.
    """
    narrowest = min(shape.channels for shape in shapes)
    if multiple is not None:
        if not 1 <= multiple <= narrowest:
            raise ValueError(f"channel_multiple must lie between 1 and the {narrowest} channels, got {multiple}")
        return multiple
    found = _LARGEST_MULTIPLE
    while found > 1 and (any(s.channels % found for s in shapes) or narrowest // found < _FEWEST_STEPS):
        found //= 2
    return found


def check_removable(shapes: Sequence[LayerShape], target: int, multiple: int) -> None:
    """Refuse a target that even the smallest possible layers do not reach.

    Raises:
        ValueError: It is one; the message says what can be removed.
    """
    most = sum(s.parameters - parameters_of(s, 1, widths_of(s.channels, multiple)[0]) for s in shapes)
    if target > most:
        raise ValueError(
            f"budget: {target:,} parameters cannot be removed: every layer keeps a group and {multiple} channels, so "
            f"at most {most:,} can go ({most / sum(s.parameters for s in shapes):.1%} of these layers)"
        )


class _Choice(NamedTuple):
    """Whole parts kept of every layer: groups, and widths by their place in the list of possible widths."""

    groups: list[int]
    widths: list[int]


def whole_parts(shapes: Sequence[LayerShape], removals: Sequence[Removal], target: int, multiple: int) -> list[Keep]:
    """Numbers of groups and channels to keep whose parameters come as near to the target as single steps allow.

    Every layer keeps at least one group and one step of channels. Groups are rounded first; channels make up for what
    that leaves, and what they leave is passed on to the next layer. Then a last search moves at most one group and a
    few steps of channels at a time while that comes nearer.

    Args:
        shapes: The layers.
        removals: What should go of each.
        target: Parameters to remove from all of them.
        multiple: Kept channels are a multiple of it, or all.

    Raises:
        ValueError: Even the smallest layers are too large; the message says what can be removed.
    """
    check_removable(shapes, target, multiple)
    widths = [widths_of(shape.channels, multiple) for shape in shapes]
    choice = _Choice([], [])
    carried = 0.0
    for shape, removal, possible in zip(shapes, removals, widths, strict=True):
        wanted = removal.groups * shape.group_parameters + removal.channels * shape.channel_parameters + carried
        groups = min(max(round(shape.groups - removal.groups), 1), shape.groups)
        left = shape.channels - (wanted - (shape.groups - groups) * shape.group_parameters) / shape.channel_parameters
        place = min(range(len(possible)), key=lambda i: abs(possible[i] - left))
        choice.groups.append(groups)
        choice.widths.append(place)
        carried = wanted - (shape.parameters - parameters_of(shape, groups, possible[place]))
    _come_nearer(shapes, widths, choice, target)
    return [Keep(g, possible[w]) for g, w, possible in zip(choice.groups, choice.widths, widths, strict=True)]


def widths_of(channels: int, multiple: int) -> list[int]:
    """Possible numbers of kept channels, ascending: multiples, and all."""
    return sorted({*range(multiple, channels, multiple), channels})


def _come_nearer(shapes: Sequence[LayerShape], widths: list[list[int]], choice: _Choice, target: int) -> None:
    """Move parts in and out of layers, in place, while that brings the removed parameters nearer to the target."""

    def removed() -> int:
        layers = zip(shapes, choice.groups, choice.widths, widths, strict=True)
        return sum(s.parameters - parameters_of(s, g, possible[w]) for s, g, w, possible in layers)

    missing = target - removed()
    while True:
        group_moves = [(0, 0, 0), *_group_moves(shapes, choice)]
        width_moves = [(0, 0, 0), *_width_moves(shapes, widths, choice)]
        nearest = min(
            ((g, w) for g in group_moves for w in width_moves),
            # the smallest move among equally good ones
            key=lambda pair: (abs(missing - pair[0][2] - pair[1][2]), abs(pair[0][1]), abs(pair[1][1])),
        )
        gain = sum(move[2] for move in nearest)
        if abs(missing - gain) >= abs(missing):
            return
        (i, groups, _), (j, steps, _) = nearest
        choice.groups[i] += groups
        choice.widths[j] += steps
        missing -= gain


def _group_moves(shapes: Sequence[LayerShape], choice: _Choice) -> Iterator[tuple[int, int, int]]:
    """Layer, change of its groups, and parameters that this removes."""
    for i, shape in enumerate(shapes):
        for change in (-1, 1):
            if 1 <= choice.groups[i] + change <= shape.groups:
                yield i, change, -change * shape.group_parameters


def _width_moves(
    shapes: Sequence[LayerShape], widths: list[list[int]], choice: _Choice
) -> Iterator[tuple[int, int, int]]:
    """Layer, change of its width in steps, and parameters that this removes."""
    for i, shape in enumerate(shapes):
        now = choice.widths[i]
        for place in range(max(0, now - 3), min(len(widths[i]), now + 4)):
            if place != now:
                yield i, place - now, (widths[i][now] - widths[i][place]) * shape.channel_parameters
