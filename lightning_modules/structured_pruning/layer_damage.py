"""What each decoder layer is worth: the loss of the model without it.

A layer is skipped by making it the identity, so the residual stream passes on (Shortened LLaMA, arXiv 2402.02834). What
comes before a skipped layer is the same as in the whole model, so it is kept and not computed again: a pass without
layer l starts at layer l.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.files import write_text
from lightning_modules.batches import Batch, logits
from lightning_modules.perplexity import mean_nll
from lightning_modules.stream import replaced
from lightning_modules.structured_pruning.layers import decoder_layers
from lightning_modules.structured_pruning.provenance import settings_hash


@dataclass(frozen=True)
class LayerDamage:
    """Losses in nats per token.

    Attributes:
        dense: Of the whole model.
        without: With each layer skipped.
        partly: With each layer cut: shares of its parts that go, and the losses then; empty where not measured.
    """

    dense: float
    without: list[float]
    partly: list[list[tuple[float, float]]] = field(default_factory=list)

    def of(self, layers: Sequence[int]) -> "LayerDamage":
        """The same of some layers."""
        partly = [self.partly[i] for i in layers] if self.partly else []
        return LayerDamage(self.dense, [self.without[i] for i in layers], partly)


def measure(
    model: Any, batches: list[dict[str, Tensor]], cache: Path, done: Callable[[int], None] = lambda count: None
) -> LayerDamage:
    """Measure every layer's damage, one pass over the batches for each, and one of the whole model.

    Memory is the model, its activations and one hidden state a token.

    Args:
        model: The model to be pruned.
        batches: Text to measure on.
        cache: JSON file that grows with every layer, so that an interrupted measurement goes on where it was; its name
            must depend on the weights and on the text.
        done: Told the number of batches done in all passes, for progress.
    """
    layers = decoder_layers(model)
    losses = measured(cache)
    states: list[Tensor] = []  # what enters layer `at`, for every batch
    at = 0
    for index in range(len(losses), len(layers) + 1):

        def counted(count: int, before: int = index * len(batches)) -> None:
            done(before + count)

        if index > 1:
            states, at = entering(model, batches, index - 1, at, states), index - 1
        with _starting_after(layers, index - 1, states) if index else nullcontext():
            losses.append(mean_nll(model, batches, counted))
        write_text(cache, json.dumps({"losses": losses, "hash": settings_hash(losses)}))
    return LayerDamage(losses[0], losses[1 : len(layers) + 1])


def cost(layers: int, left: int) -> float:
    """Forward passes' worth of the last so many passes of ``measure``: each starts later than the one before."""
    return sum((min(number, layers)) / layers for number in range(left))


@contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """Within the block, a decoder layer returns its input, and computes nothing."""
    with replaced(layer, lambda hidden: hidden):
        yield


class _Reached(Exception):
    """Ends a forward pass once the wanted layer's input is known."""


@torch.no_grad()
def entering(model: Any, batches: Sequence[Batch], layer: int, start: int, states: list[Tensor]) -> list[Tensor]:
    """Hidden states ``[B, T, H]`` that enter a layer, of every batch.

    Args:
        model: The model.
        batches: Its text.
        layer: Which layer.
        start: An earlier layer.
        states: What enters that layer; nothing where ``start`` is the first.
    """
    layers, found = decoder_layers(model), list[Tensor]()

    def caught(hidden: Tensor) -> Tensor:
        found.append(hidden)
        raise _Reached

    with ExitStack() as changes:
        if states:
            changes.enter_context(starting_before(layers, start, states))
        changes.enter_context(replaced(layers[layer], caught))
        for batch in batches:
            try:
                logits(model, batch, logits_to_keep=1)
            except _Reached:
                continue
    return found


@contextmanager
def _starting_after(layers: Sequence[nn.Module], layer: int, states: list[Tensor]) -> Iterator[None]:
    """Within the block, passes begin after a layer, with what entered it; without states at the beginning."""
    given = iter(states)
    with ExitStack() as changes:
        for before in layers[:layer]:
            changes.enter_context(skipped(before))
        changes.enter_context(replaced(layers[layer], lambda hidden: next(given) if states else hidden))
        yield


@contextmanager
def starting_before(layers: Sequence[nn.Module], layer: int, states: list[Tensor]) -> Iterator[None]:
    """Within the block, passes begin at a layer, with what enters it."""
    given = iter(states)
    with ExitStack() as changes:
        for before in layers[:layer]:
            changes.enter_context(skipped(before))
        hook = layers[layer].register_forward_pre_hook(lambda m, arguments: (next(given), *arguments[1:]))
        changes.callback(hook.remove)
        yield


def measured(cache: Path) -> list[float]:
    """Losses that are in the cache: of the whole model, then without the first layer, the second, …

    A file that is not as it was written counts as none.
    """
    try:
        read = json.loads(cache.read_text(encoding="utf-8"))
        losses: list[float] = read["losses"]
        return losses if read["hash"] == settings_hash(losses) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
