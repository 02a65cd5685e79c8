"""Free shapes: every layer keeps as many groups and channels as the allocation says."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_modules.structured_pruning.allocation.base import prunable_parameters
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.budget import Removal, check_removable, whole_parts
from lightning_modules.structured_pruning.importance.base import Keep, LayerScores
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.layout import AUTO, Layout
from lightning_modules.structured_pruning.stock import group_step, groups_for_share, in_reach, uniform_parts


def free_parts(
    shapes: Sequence[LayerShape],
    layout: Layout,
    target: int,
    dropped: Sequence[int],
    damage: LayerDamage | None,
    scores: Sequence[LayerScores] | None,
) -> tuple[list[Keep], dict[str, Any]]:
    """How many parts every layer keeps, and what there is to say of it.

    Protected layers stay whole. ``Uniform`` is uniform whatever the count: one number of groups, and one of channels
    that makes up the rest.

    Args:
        shapes: All layers.
        layout: What is asked.
        target: Parameters to remove from them.
        dropped: Indices of layers that go whole.
        damage: Losses without each layer; given where the allocation needs it.
        scores: Importances; given where the allocation needs them.

    Raises:
        ValueError: The target is not possible; the message says what is.
    """
    stay = [i for i in range(len(shapes)) if i not in dropped and i not in layout.protect_layers]
    cut = [shapes[i] for i in stay]
    check_dropped([shapes[i] for i in dropped], target)
    gone = sum(shapes[i].parameters for i in dropped)
    rest = target - gone
    notes = []
    if rest:
        _check_left(cut, rest)
    if not rest:
        parts = [Keep(s.groups, s.channels) for s in cut]
    elif (groups := _uniform_groups(cut, layout, rest)) is not None:
        parts = uniform_parts(cut, groups, rest, layout.multiple)
        notes = [group_step(cut, groups, gone, _share(cut, layout), sum(s.parameters for s in shapes))]
    else:
        chosen = damage and damage.of(stay)
        removals = _removals(cut, layout, rest, chosen, scores and [scores[i] for i in stay])
        parts = whole_parts(cut, removals, rest, layout.multiple)
    kept = dict(zip(stay, parts, strict=True))
    whole = {i: Keep(shapes[i].groups, shapes[i].channels) for i in layout.protect_layers}
    keep = [kept.get(i, whole.get(i, Keep(0, 0))) for i in range(len(shapes))]
    return keep, {"dropped": sorted(dropped), "notes": notes}


def check_free(shapes: Sequence[LayerShape], layout: Layout, target: int, rounds: int) -> None:
    """Refuse a target that the allocation, or whole parts, cannot reach; needs no weights.

    Args:
        shapes: All layers; alike where some are dropped.
        layout: What is asked.
        target: Parameters to remove from them.
        rounds: Rounds of equal size.

    Raises:
        ValueError: The message says what is possible.
    """
    droppable = layout.droppable(shapes)
    dropped, cut = droppable[: layout.dropped], [shapes[i] for i in droppable[layout.dropped :]]
    check_dropped([shapes[i] for i in dropped], target)
    rest = target - sum(shapes[i].parameters for i in dropped)
    if not rest:
        return
    _check_left(cut, rest)
    for number in range(rounds):
        gone = round(number / rounds * rest)
        more = round((number + 1) / rounds * rest) - gone
        for part, of_part in _parts(cut, layout, more):
            if of_part:
                share = of_part / more
                layout.divides.check_target(part, of_part, round(share * gone))
    check_removable(cut, rest, layout.multiple)


def check_dropped(dropped: Sequence[LayerShape], target: int) -> None:
    """Refuse to drop more than is to go.

    Raises:
        ValueError: The layers have more parameters than that.
    """
    parameters = sum(shape.parameters for shape in dropped)
    if parameters > target:
        raise ValueError(
            f"budget: dropping {len(dropped)} layers removes {parameters - target:,} parameters too many; "
            "lower drop_layers or remove more"
        )


def _check_left(cut: Sequence[LayerShape], target: int) -> None:
    """Refuse to remove parameters from no layer.

    Raises:
        ValueError: All layers are protected or dropped.
    """
    if not cut:
        raise ValueError(
            f"protect_layers: {target:,} parameters are to go, but every layer is protected or dropped; protect fewer"
        )


def _removals(
    shapes: Sequence[LayerShape],
    layout: Layout,
    target: int,
    damage: LayerDamage | None,
    scores: Sequence[LayerScores] | None,
) -> list[Removal]:
    """What goes of each layer: as the allocation says of all, or of each kind's own target."""
    divided = [
        layout.divides.removals(part, of_part, damage, scores) if of_part else [Removal(0, 0)] * len(shapes)
        for part, of_part in _parts(shapes, layout, target)
    ]
    if len(divided) == 1:
        return divided[0]
    attention, mlp = divided
    return [Removal(a.groups, m.channels) for a, m in zip(attention, mlp, strict=True)]


def _parts(shapes: Sequence[LayerShape], layout: Layout, target: int) -> list[tuple[list[LayerShape], int]]:
    """What is divided at once, and its target: whole layers; or their attention, then their MLPs."""
    if layout.attention_share == AUTO:
        return [(list(shapes), target)]
    attention = [replace(s, channel_parameters=0) for s in shapes]
    mlp = [replace(s, group_parameters=0) for s in shapes]
    first = round(layout.attention_share * target)
    return [(attention, first), (mlp, target - first)]


def _uniform_groups(shapes: Sequence[LayerShape], layout: Layout, target: int) -> int | None:
    """Groups that every layer keeps under ``Uniform``; None where another allocation, or unlike layers, are divided."""
    if not isinstance(layout.divides, Uniform) or len(set(shapes)) > 1:
        return None
    for part, of_part in _parts(shapes, layout, target):
        if of_part:
            layout.divides.check_target(part, of_part)
    check_removable(shapes, target, layout.multiple)
    groups = groups_for_share(shapes, _share(shapes, layout), target, layout.multiple)
    while groups > 1 and not in_reach(shapes, groups, target, layout.multiple):
        groups -= 1  # the MLPs alone have not so much
    return groups


def _share(shapes: Sequence[LayerShape], layout: Layout) -> float:
    """Share of the target that attention gives under ``Uniform``: the one asked for, or its part of the layer."""
    if layout.attention_share != AUTO:
        return layout.attention_share
    attention = sum(s.groups * s.group_parameters for s in shapes)
    return attention / sum(map(prunable_parameters, shapes))
