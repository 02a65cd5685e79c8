"""The matrices of the decoder layers, and statistics of their inputs, one decoder layer after the other.

Shape legend: C inputs of a matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch
from lightning_modules.stream import LayerInputs, decoder_layers, visiting


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer inside the decoder layers, by its name in the model: what is pruned.

    Raises:
        ValueError: There is none, as in GPT-2, whose layers are transposed convolutions.
    """
    found = {
        f"{layer_name}.{name}": module
        for layer_name, layer in decoder_layers(model).items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear in its decoder layers: block sparsity needs an architecture such "
            "as llama or qwen2"
        )
    return found


@torch.no_grad()
def input_norms(
    model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
) -> dict[str, Tensor]:
    """L2 norm of every input column over all calibration tokens, ``float32 [C]`` by matrix, on the matrix's device.

    Padding does not count.

    Args:
        model: A Hugging Face causal language model with its current weights.
        matrices: Linear layers of its decoder layers.
        batches: Calibration text, see ``batches.Batch``.
        device: Where to compute; layers visit it one after the other.

    Raises:
        ValueError: There is no calibration text.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            total = inputs.on_tokens(args[0]).float().pow(2).sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return hook

    inputs, layers = LayerInputs(model, batches, device), decoder_layers(model)
    hooks = [m.register_forward_pre_hook(add(name)) for name, m in matrices.items()]
    try:
        with stage("Input norms", len(layers), "layers") as done:
            for number, layer in enumerate(layers.values(), 1):
                with visiting(layer, device):
                    inputs.advance(layer)
                done(number)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: squares[name].sqrt().to(m.weight.device) for name, m in matrices.items()}
