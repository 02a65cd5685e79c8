"""Pruning in several rounds, each followed by a short recovery."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lightning_modules.structured_pruning.evaluation import backward
from lightning_modules.structured_pruning.layers import ATTENTION, MLP
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan

_RANK = 8


def short_recovery(
    model: Any,
    batches: Sequence[dict[str, Tensor]],
    steps: int,
    learning_rate: float,
    done: Callable[[int], None] = lambda count: None,
) -> Any:
    """Train low-rank adapters on all seven projections for a few steps and merge them.

    Args:
        model: A pruned model; its weights change.
        batches: Text, taken again from the beginning when it ends.
        steps: Optimizer steps, a batch each.
        learning_rate: Of AdamW, constant.
        done: Told the number of steps done, for progress.

    Returns:
        The merged model, in evaluation mode.
    """
    projections = list(ATTENTION + MLP)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=projections, task_type="CAUSAL_LM")
    )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps), 1):
        backward(adapted, batch)
        optimizer.step()
        optimizer.zero_grad()
        done(step)
    return adapted.merge_and_unload().requires_grad_(True).eval()


def composed(plans: Sequence[PruningPlan]) -> PruningPlan:
    """One plan that keeps what all rounds keep, in numbers of the first model."""
    first, *later = plans
    layers = list(first.layers)
    for plan in later:
        follows = iter(plan.layers)  # a dropped layer is not in later plans
        layers = [layer if layer.dropped else _within(layer, next(follows)) for layer in layers]
    return PruningPlan(layers, first.shapes, first.base, first.base_hash, plans[-1].settings)


def _within(layer: LayerPlan, later: LayerPlan) -> LayerPlan:
    return LayerPlan([layer.groups[g] for g in later.groups], [layer.channels[c] for c in later.channels])
