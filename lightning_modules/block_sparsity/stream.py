"""Calibration, one decoder layer after the other: only one layer's inputs, and one layer's weights, are on the device.

Shape legend: B sequences, T tokens, H hidden size, C inputs of a matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch, logits, tokens_of


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's decoder layers by name, in order.

    Raises:
        ValueError: The architecture does not say what its layers are, or they are not all of one kind of attention.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    if not layers:
        raise ValueError(f"{type(model).__name__} names no decoder layers (_no_split_modules)")
    if len(set(getattr(model.config, "layer_types", None) or ["full"])) > 1:
        raise ValueError(f"{type(model).__name__}: layers with different kinds of attention are not supported")
    return layers


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


class _FirstLayerReached(Exception):
    """Ends a forward pass once the first decoder layer's inputs are known."""


class LayerInputs:
    """What the next decoder layer is given: hidden states ``[B, T, H]`` of every batch, and its other arguments.

    Args:
        model: A Hugging Face causal language model.
        batches: Calibration text, see ``batches.Batch``.
        device: Where layers will run.

    Raises:
        ValueError: There is no calibration text.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], device: torch.device) -> None:
        if not batches:
            raise ValueError("calibration needs at least one batch of text")
        self.hidden: list[Tensor] = []
        self._batches = batches
        self._current = 0
        self._rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first, *rest = args if args else (kwargs.pop("hidden_states"),)
            self.hidden.append(_to(first.detach(), device))
            self._rest.append((_to(tuple(rest), device), _to(kwargs, device)))
            raise _FirstLayerReached

        hook = next(iter(decoder_layers(model).values())).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches:
                try:
                    logits(model, batch)
                except _FirstLayerReached:
                    continue
        finally:
            hook.remove()

    def through(self, layer: nn.Module, batch: int) -> Tensor:
        """The layer's output for one batch."""
        self._current = batch
        args, kwargs = self._rest[batch]
        out = layer(self.hidden[batch], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def on_tokens(self, values: Tensor, batch: int | None = None) -> Tensor:
        """What stands on tokens, without padding: ``[…, F]`` to ``[n, F]``.

        Args:
            values: Of every position of a batch, in one row or in several; anything else, such as the tokens of one
                expert, is only made flat.
            batch: Which batch; by default the one that is going through a layer.
        """
        text = self._batches[self._current if batch is None else batch]
        flat, shape = values.flatten(0, -2), text["input_ids"].shape
        return tokens_of(flat.unflatten(0, shape), text) if len(flat) == shape.numel() else flat

    def advance(self, layer: nn.Module) -> None:
        """Replace every batch's hidden states by the layer's output, one batch at a time."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.through(layer, batch)


@contextmanager
def visiting(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a layer on the device for a while, in evaluation mode; afterwards it is where and as it was."""
    home, training = next(layer.parameters()).device, layer.training
    layer.to(device).eval()
    try:
        yield
    finally:
        layer.to(home).train(training)


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


def _to(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dictionaries moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return {name: _to(item, device) for name, item in value.items()} if isinstance(value, dict) else value
