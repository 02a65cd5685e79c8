"""How the loss rises as more goes of one layer and all others stay whole.

What comes before a layer is the same whatever goes of it, so it is computed once (see ``layer_damage``).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_modules.batches import Batch
from lightning_modules.perplexity import mean_nll
from lightning_modules.structured_pruning import loss_file
from lightning_modules.structured_pruning.layer_damage import entering, starting_before
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.masking import layer_masked
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.provenance import settings_hash


def measure(
    model: Any,
    batches: Sequence[Batch],
    plans: Sequence[Sequence[LayerPlan]],
    cache: Path,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[float]]:
    """Losses in nats per token of the model with one layer cut, for every layer and plan of it.

    Args:
        model: The model to be pruned.
        batches: Text to measure on.
        plans: What to keep of each layer, in turn.
        cache: JSON file that grows with every loss; its name must depend on the weights and on the text.
        done: Told the number of losses known, for progress.
    """
    layers, losses = decoder_layers(model), loss_file.read(cache)
    names = [[key(index, plan) for plan in mine] for index, mine in enumerate(plans)]
    known = sum(name in losses for mine in names for name in mine)
    states, at = list[Tensor](), 0
    for index, mine in enumerate(plans):
        missing = [(name, plan) for name, plan in zip(names[index], mine, strict=True) if name not in losses]
        if not missing:
            continue
        if index:
            states, at = entering(model, batches, index, at, states), index
        shape = shape_of(layers[index])
        for name, plan in missing:
            entered = starting_before(layers, index, states) if index else nullcontext()
            with entered, layer_masked(layers[index], shape, plan):
                losses[name] = mean_nll(model, batches)
            loss_file.write(cache, losses)
            known += 1
            done(known)
    return [[losses[name] for name in mine] for mine in names]


def key(index: int, plan: LayerPlan) -> str:
    """Name of a loss in the cache."""
    return f"{index} {settings_hash([list(plan.groups), list(plan.channels)])}"
