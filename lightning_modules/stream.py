"""Calibration, one decoder layer after the other: only one layer's inputs, and one layer's weights, are on the device.

Shape legend: B sequences, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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

    def through(self, layer: nn.Module, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The layer's output for one batch, or for other hidden states of it."""
        self._current = batch
        args, kwargs = self._rest[batch]
        out = layer(self.hidden[batch] if hidden is None else hidden, *args, **kwargs)
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


def backward(model: nn.Module, batch: Batch, device: torch.device, loss: Callable[[Tensor], Tensor]) -> None:
    """A forward and a backward pass of one batch: the layers get the gradients of a pass through the whole model.

    Layers visit the device one after the other, and each is computed twice: what entered all of them is kept, what is
    between is not. What is outside of them gets no gradients.

    Args:
        model: A Hugging Face causal language model.
        batch: Text.
        device: Where to compute.
        loss: A number, from the logits.
    """
    layers = list(decoder_layers(model).values())
    entered: list[Tensor] = []
    with torch.no_grad():
        stream = LayerInputs(model, [batch], device)
        for layer in layers:
            entered += stream.hidden
            with visiting(layer, device):
                stream.advance(layer)
    hidden = stream.hidden[0].requires_grad_()
    with torch.enable_grad(), _after_layers(model, layers, hidden, device):
        loss(logits(model, batch)).backward()
    for layer in reversed(layers):
        gradient, hidden = hidden.grad, entered.pop().requires_grad_()
        with torch.enable_grad(), visiting(layer, device):
            stream.through(layer, 0, hidden).backward(gradient)


@contextmanager
def _after_layers(
    model: nn.Module, layers: Sequence[nn.Module], hidden: Tensor, device: torch.device
) -> Iterator[None]:
    """Within the block, a pass computes what follows the last layer, from these hidden states, on the device."""
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if module not in inside]
    homes: list[tuple[nn.Module, str, Tensor]]
    homes = [(module, *named) for module in outside for named in module.named_parameters(recurse=False)]
    homes += [(module, *named) for module in outside for named in module.named_buffers(recurse=False)]
    there: dict[Tensor, Tensor] = {}  # tied weights go once
    with ExitStack() as changes:
        for layer in layers:
            changes.enter_context(replaced(layer, lambda _: hidden))
        for module, name, home in homes:
            if home not in there:
                moved = home.detach().to(device)
                there[home] = nn.Parameter(moved, False) if isinstance(home, nn.Parameter) else moved
            changes.callback(setattr, module, name, home)
            setattr(module, name, there[home])
        yield


@contextmanager
def replaced(layer: nn.Module, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, a decoder layer computes this of its hidden states."""

    def forward(*arguments: Any, **keywords: Any) -> Tensor:
        return compute(arguments[0] if arguments else keywords["hidden_states"])

    before = vars(layer).get("forward")  # there where something else has put its own
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


@contextmanager
def visiting(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a layer on the device for a while, in evaluation mode; afterwards it is where and as it was."""
    home, training = next(layer.parameters()).device, layer.training
    layer.to(device).eval()
    try:
        yield
    finally:
        layer.to(home).train(training)


def _to(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dictionaries moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return {name: _to(item, device) for name, item in value.items()} if isinstance(value, dict) else value
