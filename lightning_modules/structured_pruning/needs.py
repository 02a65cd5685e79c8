"""What a compensation needs: so many tokens of text in so many rows, and for output biases a class that has them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_modules.batches import Batch
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.layers import ATTENTION, MLP, LayerShape, decoder_layers, family
from lightning_modules.structured_pruning.plan import LayerPlan


def check_request(compensation: Compensation, config: Any, inputs: int, tokens: float, rows: int) -> None:
    """Refuse what no calibration text can make possible, see ``check_tokens`` and ``check_biases``.

    Args:
        compensation: What is to be fitted.
        config: The model's configuration.
        inputs: Of the widest matrix that will be left, at least.
        tokens: Of the text, at most; infinite where that is not known.
        rows: Blocks of it.

    Raises:
        ValueError: The message says what is possible.
    """
    if compensation.bias:
        check_biases(config)
    check_tokens(compensation, inputs, config.hidden_size, tokens, rows)


def amount(batches: Sequence[Batch]) -> tuple[int, int]:
    """Tokens without padding, and rows."""
    masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches)
    return sum(int(mask.sum()) for mask in masks), sum(len(batch["input_ids"]) for batch in batches)


def most_inputs(shapes: Sequence[LayerShape], removed: int = 0) -> int:
    """Inputs of the widest ``o_proj`` or ``down_proj``; at least, once so many parameters will have been removed."""
    heads = [(s.groups * s.n_rep * s.head_dim, s.groups * s.group_parameters) for s in shapes]
    channels = [(s.channels, s.channels * s.channel_parameters) for s in shapes]
    if not removed:
        return max(width for width, _ in heads + channels)
    # All that goes may come from one kind; what is left of that is widest nowhere less than on average.
    bounds = []
    for kind in (heads, channels):
        price = sum(parameters / width for width, parameters in kind)
        bounds.append((sum(parameters for _, parameters in kind) - removed) / price)
    return math.ceil(max(bounds))


def plan_inputs(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan]) -> int:
    """Inputs of the widest ``o_proj`` or ``down_proj`` that a plan leaves."""
    pairs = [(s, layer) for s, layer in zip(shapes, layers, strict=True) if not layer.dropped]
    return max(max(len(layer.groups) * s.n_rep * s.head_dim, len(layer.channels)) for s, layer in pairs)


def check_tokens(compensation: Compensation, inputs: int, outputs: int, tokens: float, rows: int) -> None:
    """Refuse calibration text that leaves a matrix undetermined while a part of the text is held out.

    Args:
        compensation: What is to be fitted.
        inputs: Of the widest matrix.
        outputs: Of it.
        tokens: Of the text, without padding.
        rows: Blocks or samples of the text.

    Raises:
        ValueError: The message says how many tokens and blocks are needed.
    """
    folds = compensation.folds
    needed = math.ceil(compensation.fewest_tokens(inputs, outputs) * folds / (folds - 1))
    if not compensation.refits or (tokens >= needed and rows >= folds):
        return
    blocks = max(folds, math.ceil(needed * rows / max(tokens, 1)))
    raise ValueError(
        f"compensation: {compensation.name} of matrices with {inputs:,} inputs needs {needed:,} tokens of calibration "
        f"text in {folds} blocks or more, as one part in {folds} is held out, and there are {tokens:,} in {rows}; set "
        f"calibration_blocks to at least {blocks}, or compensation to Unchanged"
    )


def add_output_biases(model: Any) -> None:
    """Give ``o_proj`` and ``down_proj`` of a Llama a bias of zeros, and so, as its class wants it, all projections.

    Raises:
        ValueError: The architecture's class has no such biases.
    """
    check_biases(model.config)
    config = model.config
    for field, names, part in (("attention_bias", ATTENTION, "self_attn"), ("mlp_bias", MLP, "mlp")):
        if getattr(config, field):
            continue
        setattr(config, field, True)
        for layer in decoder_layers(model):
            for linear in (getattr(getattr(layer, part), name) for name in names):
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def check_biases(config: Any) -> None:
    """Refuse an architecture whose class has no output biases.

    Raises:
        ValueError: It is not Llama.
    """
    if family(config) != "llama":
        raise ValueError(
            f"compensation: {family(config)} has no bias on o_proj and down_proj; use LeastSquares without bias, or "
            "Rotation"
        )
