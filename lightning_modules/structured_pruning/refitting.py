"""Compensation, one decoder layer after the other: what a sliced model's matrices should be, and putting them there.

The inputs of a layer are those that the sliced and already refitted layers before it give. What it should give is what
the whole layer gives on the same inputs; the layer before dropped ones should also give what these would have added.
``o_proj`` is refitted first, then ``down_proj``, which makes up for what ``o_proj`` has left, too. Besides the two
models memory is the hidden states of the calibration text, what one layer adds to them, and the moments of one matrix.

Shape legend: B sequences, T tokens, n tokens without padding, H hidden size, K kept inputs of a matrix.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch, tokens_of
from lightning_modules.stream import LayerInputs
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.compensation.base import Fit
from lightning_modules.structured_pruning.layers import ATTENTION, MLP, LayerShape, decoder_layers, family, shape_of
from lightning_modules.structured_pruning.moments import Matrix, Moments
from lightning_modules.structured_pruning.plan import PruningPlan
from lightning_modules.structured_pruning.provenance import tensors_hash

SETTING = "compensation"
"""Where a plan's settings say what was refitted: ``described``."""


@dataclass(frozen=True)
class Refit:
    """What a compensation has changed of a sliced model.

    Attributes:
        tensors: Changed and added parameters by their names in the sliced model, in its dtype, on the CPU.
        fits: One entry a matrix: ``layer`` (of the model before), ``matrix``, ``setting``, and the error that slicing
            has ``left`` and that is there once it is ``refitted``, as shares of what the matrix should give; the latter
            on text that was held out.
    """

    tensors: dict[str, Tensor]
    fits: list[dict[str, Any]]


def compensate(
    dense: Any,
    sliced: Any,
    plan: PruningPlan,
    batches: Sequence[Batch],
    compensation: Compensation,
) -> tuple[PruningPlan, Refit]:
    """Refit a sliced model; its weights change.

    Args:
        dense: The model that it was sliced from.
        sliced: What ``slice_model`` made of it by the plan.
        plan: What is kept.
        batches: Calibration text.
        compensation: How to fit.

    Returns:
        The plan, whose settings now say what was refitted and how one knows it again; and what has changed.

    Raises:
        ValueError: The text is too little, or the architecture has no output biases.
    """
    found = refit(dense, sliced, plan, batches, compensation) if compensation.refits else Refit({}, [])
    described = {
        "name": compensation.name,
        **compensation.config(),
        "tensors": hashes_of(found.tensors),
        "fits": found.fits,
    }
    return replace(plan, settings=plan.settings | {SETTING: described}), found


@torch.no_grad()
def refit(
    dense: Any,
    sliced: Any,
    plan: PruningPlan,
    batches: Sequence[Batch],
    compensation: Compensation,
) -> Refit:
    """See ``compensate``."""
    names = {name for name, _ in sliced.named_parameters()}
    kept = [i for i, layer in enumerate(plan.layers) if not layer.dropped]
    shapes = [shape_of(layer) for layer in decoder_layers(sliced)]
    check_tokens(compensation, most_inputs(shapes), sliced.config.hidden_size, *amount(batches))
    if compensation.bias:
        add_output_biases(sliced)
    changed = {name for name, _ in sliced.named_parameters()} - names
    inputs, folds = LayerInputs(sliced, batches, sliced.device), _Folds(batches, compensation.folds)
    fits: list[dict[str, Any]] = []
    with stage(f"Compensation by {compensation.name}", len(kept), "layers") as done:
        for new, (old, after) in enumerate(zip(kept, [*kept[1:], len(plan.layers)], strict=True)):
            layer = decoder_layers(sliced)[new]
            for name, fit in _refit_layer(layer, decoder_layers(dense)[old:after], inputs, folds, compensation):
                shares = {"setting": fit.setting, "left": fit.left, "refitted": fit.refitted}
                fits.append({"layer": old, "matrix": name, **shares})
                if fit.matrix is not None:
                    kinds = ("weight",) if fit.matrix.bias is None else ("weight", "bias")
                    changed |= {f"model.layers.{new}.{name}.{kind}" for kind in kinds}
            inputs.advance(layer)
            done(new + 1)
    return Refit({n: p.detach().cpu().clone() for n, p in sliced.named_parameters() if n in changed}, fits)


def _refit_layer(
    layer: Any, whole: Sequence[Any], inputs: LayerInputs, folds: "_Folds", compensation: Compensation
) -> Iterator[tuple[str, Fit]]:
    """Refit a sliced layer, in place, to what the whole one and the dropped ones after it add to the residual stream.

    Yields:
        Name of a matrix and what became of it, as soon as that is in place. Nothing for a layer that is as it was.
    """
    first, attention, down = whole[0], layer.self_attn, layer.mlp.down_proj
    fewer_heads = attention.o_proj.in_features < first.self_attn.o_proj.in_features
    if not fewer_heads and down.in_features == first.mlp.down_proj.in_features and len(whole) == 1:
        return
    added: list[Tensor] = []  # [B, T, H] a batch
    moments = folds.none(attention.o_proj) if fewer_heads else []
    for batch in range(len(inputs.hidden)):
        attended, total = _added(whole, inputs, batch)
        added.append(total)
        if fewer_heads:
            with _input_of(attention.o_proj) as given:
                inputs.through(layer, batch)
            folds.count(moments, batch, given[0], attended)
    if fewer_heads:
        yield "self_attn.o_proj", _fitted(attention.o_proj, compensation, moments)
    moments = folds.none(down)
    for batch, total in enumerate(added):
        with _output_of(attention) as attended_now, _input_of(down) as given:
            inputs.through(layer, batch)
        folds.count(moments, batch, given[0], total.float() - attended_now[0].float())
    yield "mlp.down_proj", _fitted(down, compensation, moments)


def _added(layers: Sequence[Any], inputs: LayerInputs, batch: int) -> tuple[Tensor, Tensor]:
    """What the first layer's attention adds to the residual stream, and what all layers add; ``[B, T, H]``."""
    hidden, parts = inputs.hidden[batch], []
    for layer in layers:
        with _output_of(layer.self_attn) as attended, _output_of(layer.mlp) as computed:
            hidden = inputs.through(layer, batch, hidden)
        parts += [attended[0], computed[0]]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total = total + part
    return parts[0], total


def _fitted(linear: nn.Linear, compensation: Compensation, folds: Sequence[Moments]) -> Fit:
    """Fit a matrix and put it in place."""
    bias = None if linear.bias is None else linear.bias.double()
    fit = compensation.fit(Matrix(linear.weight.double(), bias), folds)
    if fit.matrix is not None:
        linear.weight.copy_(fit.matrix.weight)
        if fit.matrix.bias is not None:
            linear.bias.copy_(fit.matrix.bias)
    return fit


class _Enough(Exception):
    """Ends a forward pass once what was wanted of it is known."""


@contextmanager
def _input_of(linear: nn.Linear) -> Iterator[list[Tensor]]:
    """Fill the list with what a linear layer is given in the block, which ends there."""
    given: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        given.append(arguments[0])
        raise _Enough

    hook = linear.register_forward_pre_hook(stop)
    try:
        yield given
    except _Enough:
        pass
    finally:
        hook.remove()


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Fill the list with what a module gives in the block."""
    given: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        given.append(output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_hook(keep)
    try:
        yield given
    finally:
        hook.remove()


class _Folds:
    """Calibration text in parts, each of which is held out once: rows are dealt to them in turn.

    Args:
        batches: The text.
        count: Parts, if there are so many rows.
    """

    def __init__(self, batches: Sequence[Batch], count: int) -> None:
        lengths = [len(batch["input_ids"]) for batch in batches]
        self._fewer = min(count, sum(lengths))
        self._batches = batches
        self._starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def none(self, linear: nn.Linear) -> list[Moments]:
        """Moments of no text yet, for each part."""
        device = linear.weight.device
        return [Moments.none(linear.in_features, linear.out_features, device) for _ in range(self._fewer)]

    def count(self, moments: Sequence[Moments], batch: int, given: Tensor, wanted: Tensor) -> None:
        """Count a batch, of which a matrix is given ``[B, T, K]`` and should give ``[B, T, H]``; without padding."""
        text, start = self._batches[batch], self._starts[batch]
        shape = text["input_ids"].shape  # flash attention has all rows in one
        x_BTK, y_BTH = (part.flatten(0, -2).unflatten(0, shape) for part in (given, wanted))
        for row in range(shape[0]):
            one = {name: part[row : row + 1] for name, part in text.items()}
            x_nK, y_nH = (tokens_of(part[row : row + 1], one) for part in (x_BTK, y_BTH))
            moments[(start + row) % len(moments)].add(x_nK, y_nH)


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


@torch.no_grad()
def put_refitted(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put what a compensation has changed into a slice that is as it was then; its weights change.

    Raises:
        ValueError: The tensors are not of this model.
    """
    if tensors.keys() - dict(model.named_parameters()).keys():
        add_output_biases(model)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"compensation: the refitted {name} does not fit this model; prune the model again")
        parameters[name].copy_(tensor)


def hashes_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor, by its name."""
    return {name: tensors_hash({name: tensor}) for name, tensor in tensors.items()}


def refitted_hashes(plan: PruningPlan) -> dict[str, str]:
    """What a plan says of the tensors that were refitted after slicing by it; empty where none were."""
    hashes: dict[str, str] = plan.settings.get(SETTING, {}).get("tensors", {})
    return hashes


def check_refitted(sliced: Any, refitted: Any, plan: PruningPlan, rounding: bool = False) -> None:
    """Refuse a model that differs from a slice in more than what its compensation has changed.

    Args:
        sliced: The slice, which need not have been compensated.
        refitted: The compensated model.
        plan: Its plan, which says what the compensation has changed.
        rounding: Adapters were merged again to make the slice, which another processor may round otherwise.

    Raises:
        ValueError: The message names a tensor that was changed later.
    """
    slice_state, state, hashes = sliced.state_dict(), refitted.state_dict(), refitted_hashes(plan)
    for name in sorted(slice_state.keys() | state.keys()):
        if name in hashes:
            same = name in state and hashes_of({name: state[name]}) == {name: hashes[name]}
            what = "is not what the compensation has made"
        else:
            same = name in state and name in slice_state and _same(state[name], slice_state[name], rounding)
            what = "is not that of the slice"
        if not same:
            raise ValueError(f"verify: {name} {what}: weights were changed after pruning, or model.dtype is another")


def _same(one: Tensor, other: Tensor, rounding: bool) -> bool:
    other = other.to(one)
    if one.shape != other.shape or not rounding:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= 4 * torch.finfo(one.dtype).eps * other.abs().max())
