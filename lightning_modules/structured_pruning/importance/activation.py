"""How much a part's output adds to the residual stream; needs no gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.batches import Batch, logits, tokens_of
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.memory import Workload


class Activation(Importance):
    """Σ over tokens of x² · ‖W column‖², with x the input of o_proj or down_proj, summed over the part.

    Forward passes only, like Minitron (arXiv 2407.14679). ``Fluctuation`` leaves the mean out.
    """

    passes = 1.0

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        return by_parts(model, {linear: sums.squares for linear, sums in input_sums(model, batches).items()})

    def memory(self, work: Workload) -> int:
        """See ``Importance.memory``."""
        return work.forward(work.batch_tokens, wide=4)  # what is read is squared


class Sums(NamedTuple):
    """Sums over the tokens of a linear layer's input.

    Attributes:
        values: float32 ``[in_features]``.
        squares: float32 ``[in_features]``.
        tokens: Their number, float32 ``[]``.
    """

    values: Tensor
    squares: Tensor
    tokens: Tensor


def input_sums(model: Any, batches: Sequence[Batch]) -> dict[nn.Linear, Sums]:
    """Sums of the inputs of every layer's o_proj and down_proj, in one forward pass."""
    device = next(model.parameters()).device
    linears = [part for layer in decoder_layers(model) for part in _linears(layer)]
    found = {
        linear: Sums(*(torch.zeros(size, device=device) for size in (linear.in_features, linear.in_features, ())))
        for linear in linears
    }
    with torch.no_grad():
        for batch in batches:
            handles = [linear.register_forward_pre_hook(_add(sums, batch)) for linear, sums in found.items()]
            try:
                logits(model, batch, logits_to_keep=1)
            finally:
                for handle in handles:
                    handle.remove()
    return found


def by_parts(model: Any, energy: dict[nn.Linear, Tensor]) -> list[LayerScores]:
    """Energies of inputs times those of the columns that read them, summed over the parts."""
    found = []
    for layer in decoder_layers(model):
        heads, channels = (energy[linear] * _column_energy(linear) for linear in _linears(layer))
        found.append(LayerScores(heads.view(shape_of(layer).groups, -1).sum(1).cpu(), channels.cpu()))
    return found


def _linears(layer: Any) -> tuple[nn.Linear, nn.Linear]:
    return layer.self_attn.o_proj, layer.mlp.down_proj


def _add(sums: Sums, batch: Batch) -> Any:
    def hook(module: nn.Module, arguments: Any) -> None:
        x = tokens_of(arguments[0], batch).float()
        sums.values.add_(x.sum(0))
        sums.squares.add_(x.square().sum(0))
        sums.tokens.add_(len(x))

    return hook


def _column_energy(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().float().square().sum(0)
