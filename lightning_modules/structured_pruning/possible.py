"""What can be removed at all: told from the model's configuration, before any weight or text is read."""

from collections.abc import Sequence
from typing import Any

from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.budget import widths_of
from lightning_modules.structured_pruning.free import check_free
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.layout import Layout
from lightning_modules.structured_pruning.trials import check_stock

_SHARES = 128  # so many parts of the largest share are looked at


def check_possible(config: Any, shapes: Sequence[LayerShape], target: int, layout: Layout, rounds: int) -> None:
    """Refuse what no damages, scores and trials can make possible; needs no weights.

    Where layers differ in size and some are to be dropped, which ones only damages say, and only they can tell.

    Args:
        config: The model's configuration.
        shapes: The layers.
        target: Parameters to remove from all of them.
        layout: What is asked.
        rounds: Rounds of equal size.

    Raises:
        ValueError: The message says what is possible.
    """
    layout.check(shapes)
    check_steps(shapes, target, layout, rounds)
    if layout.dropped and len({shape.parameters for shape in shapes}) > 1:
        return
    if layout.shape == "stock":
        check_stock(config, shapes, layout, target)
    else:
        check_free(shapes, layout, target, rounds)


def possible_shares(config: Any, shapes: Sequence[LayerShape], most: float, layout: Layout) -> list[float]:
    """Shares of the layers' parameters, ascending up to ``most``, that can be removed and remove something.

    Args:
        config: See ``check_possible``.
        shapes: The layers.
        most: The largest share, which is possible.
        layout: What is asked.
    """
    total, found = sum(shape.parameters for shape in shapes), []
    for number in range(1, _SHARES):
        share = most * number / _SHARES
        try:
            check_possible(config, shapes, round(share * total), layout, 1)
        except ValueError:
            continue
        found.append(share)
    return [*found, most]


def check_steps(shapes: Sequence[LayerShape], target: int, layout: Layout, rounds: int) -> None:
    """Refuse a target for which nothing would be removed, at all or in some round: parts can only go whole.

    Raises:
        ValueError: The message says what can be removed.
    """
    firsts = [s.channels - max((0, *widths_of(s.channels, layout.multiple)[:-1])) for s in shapes]
    channels = [first * s.channel_parameters for first, s in zip(firsts, shapes, strict=True)]
    groups = [s.group_parameters for s in shapes if s.groups > 1]
    uneven = len({(s.groups, s.channels) for s in shapes}) > 1  # a stock shape of such layers takes the surplus first
    if layout.dropped or (layout.shape == "stock" and uneven):
        return
    alike = layout.shape == "stock" or (isinstance(layout.divides, Uniform) and not uneven)
    together = sum if alike else min
    step = min(together(channels), together(groups)) if len(groups) == len(shapes) else together(channels)
    of, total = "every layer" if alike else "a layer", sum(s.parameters for s in shapes)
    goes = f"the least that goes is {layout.multiple} channels or a group of {of}, {step / total:.2%} of these layers"
    if 2 * target <= step:
        raise ValueError(
            f"budget: {target:,} parameters are too few to remove: {goes}; remove more than half of that, or lower "
            "channel_multiple"
        )
    removed = 0  # what a round leaves, or takes too much, is the next one's
    for number in range(1, rounds + 1):
        steps = round((round(number / rounds * target) - removed) / step)
        if not steps:
            raise ValueError(
                f"rounds: {target:,} parameters cannot go in {rounds} rounds, round {number} would remove nothing: "
                f"{goes}; take fewer rounds, or lower channel_multiple"
            )
        removed += steps * step
