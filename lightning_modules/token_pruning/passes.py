"""Forward passes that are watched, and that end where nothing more is asked for.

Shape legend: B sequences, N tokens, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.token_pruning.anatomy import Rotary, anatomy

See = Callable[[int, Tensor, Rotary | None], None]
"""Gets a layer's index, the hidden states [B, N, H] that enter it, and their cos and sin (None without rotary
positions)."""


@contextmanager
def watched(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Show what enters every decoder layer in the forward passes of this block."""
    parts = anatomy(model)

    def watch(index: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = dict(zip(parts.arguments, args, strict=False)) | kwargs
            with torch.no_grad():
                see(index, call["hidden_states"], call.get("position_embeddings"))

        return before

    handles = [layer.register_forward_pre_hook(watch(i), with_kwargs=True) for i, layer in enumerate(parts.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """All that was asked for has been computed."""


@contextmanager
def ending_at(model: PreTrainedModel, layer: int | None) -> Iterator[None]:
    """End the forward pass in this block at the input of a layer, and with it the block; None lets it go on.

    Enter it last: what hooks do at that layer, those of contexts entered before do still see.
    """
    if layer is None:
        yield
        return

    def enough(_: nn.Module, __: tuple) -> None:
        raise _Enough

    handle = anatomy(model).layers[layer].register_forward_pre_hook(enough)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()
