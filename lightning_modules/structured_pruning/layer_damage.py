"""What each decoder layer is worth: the loss of the model without it.

A layer is skipped by making it the identity, so the residual stream passes on (Shortened LLaMA, arXiv 2402.02834).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.files import write_text
from lightning_modules.perplexity import mean_nll
from lightning_modules.structured_pruning.layers import decoder_layers
from lightning_modules.structured_pruning.provenance import settings_hash


@dataclass(frozen=True)
class LayerDamage:
    """Losses in nats per token: of the whole model, and with each layer skipped."""

    dense: float
    without: list[float]


def measure(
    model: Any, batches: list[dict[str, Tensor]], cache: Path, done: Callable[[int], None] = lambda count: None
) -> LayerDamage:
    """Measure every layer's damage, one pass over the batches for each.

    Args:
        model: The model to be pruned.
        batches: Text to measure on.
        cache: JSON file that grows with every layer, so that an interrupted measurement goes on where it was; its name
            must depend on the weights and on the text.
        done: Told the number of batches done in all passes, for progress.
    """
    layers = decoder_layers(model)
    losses = measured(cache)
    for index in range(len(losses), len(layers) + 1):

        def counted(count: int, before: int = index * len(batches)) -> None:
            done(before + count)

        with skipped(layers[index - 1]) if index else nullcontext():
            losses.append(mean_nll(model, batches, counted))
        write_text(cache, json.dumps({"losses": losses, "hash": settings_hash(losses)}))
    return LayerDamage(losses[0], losses[1 : len(layers) + 1])


@contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """Within the block, a decoder layer returns its input."""

    def identity(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(identity, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
