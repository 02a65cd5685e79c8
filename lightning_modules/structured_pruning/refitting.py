"""Compensation, one decoder layer after the other: what a sliced model's matrices should be, and putting them there.

The inputs of a layer are those that the sliced and already refitted layers before it give. What it should add to them
is what leads to the dense model's hidden states, so that no layer builds on what the one before has left undone; or,
where a compensation does not follow the dense model, what the whole layer adds to the same inputs. The layer before
dropped ones should also give what these would have added. ``o_proj`` is refitted first, then ``down_proj``, which makes
up for what ``o_proj`` has left, too. Besides the two models memory is the hidden states of the calibration text in
both, what one layer should add to them, and the moments of one matrix.

Shape legend: B sequences, T tokens, n tokens without padding, H hidden size, K kept inputs of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch, tokens_of
from lightning_modules.stream import LayerInputs
from lightning_modules.structured_pruning import learning
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.moments import Matrix, Moments
from lightning_modules.structured_pruning.needs import add_output_biases, amount, check_tokens, most_inputs
from lightning_modules.structured_pruning.plan import PruningPlan
from lightning_modules.structured_pruning.refitted import SETTING, hashes_of


@dataclass(frozen=True)
class Refit:
    """What a compensation has changed of a sliced model.

    Attributes:
        tensors: Changed and added parameters by their names in the sliced model, in its dtype, on the CPU.
        fits: One entry a matrix: ``layer`` (of the model before), ``matrix``, ``setting``, and the error that slicing
            has ``left`` and that is there once it is ``refitted``, as shares of what the matrix should give; the latter
            on text that was held out. Of an MLP that learns (``mlp``) what its refit has left, and what learning has.
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
    found = Refit({}, [])
    if compensation.refits:
        kept = sum(not layer.dropped for layer in plan.layers)
        with stage(f"Compensation by {compensation.name}", kept, "layers") as done:
            found = refit(dense, sliced, plan, batches, compensation, done)
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
    done: Callable[[int], None] = lambda layers: None,
) -> Refit:
    """See ``compensate``; ``done`` is told how many layers are, for progress."""
    names = {name for name, _ in sliced.named_parameters()}
    kept = [i for i, layer in enumerate(plan.layers) if not layer.dropped]
    shapes = [shape_of(layer) for layer in decoder_layers(sliced)]
    check_tokens(compensation, most_inputs(shapes), sliced.config.hidden_size, *amount(batches))
    if compensation.bias:
        add_output_biases(sliced)
    changed = {name for name, _ in sliced.named_parameters()} - names
    streams, folds = _Streams.of(dense, sliced, batches, compensation), _Folds(batches, compensation.folds)
    if streams.dense:
        for dropped in decoder_layers(dense)[: kept[0]]:
            streams.dense.advance(dropped)
    fits: list[dict[str, Any]] = []
    for new, (old, after) in enumerate(zip(kept, [*kept[1:], len(plan.layers)], strict=True)):
        layer = decoder_layers(sliced)[new]
        for fit in _refit_layer(layer, decoder_layers(dense)[old:after], streams, folds, compensation):
            fits.append({"layer": old, **fit._asdict()})
            changed |= {f"model.layers.{new}.{name}" for name in fits[-1].pop("changed")}
        streams.sliced.advance(layer)
        done(new + 1)
    return Refit({n: p.detach().cpu().clone() for n, p in sliced.named_parameters() if n in changed}, fits)


@dataclass
class _Streams:
    """What the next layers are given.

    Attributes:
        sliced: In the sliced model, which is refitted so far.
        dense: In the dense model; None where that is not followed.
    """

    sliced: LayerInputs
    dense: LayerInputs | None

    @classmethod
    def of(cls, dense: Any, sliced: Any, batches: Sequence[Batch], compensation: Compensation) -> "_Streams":
        """At the first layer."""
        followed = LayerInputs(dense, batches, dense.device) if compensation.follow else None
        return cls(LayerInputs(sliced, batches, sliced.device), followed)

    def parted(self) -> bool:
        """Whether the sliced model is not where the dense one is."""
        pairs = zip(self.sliced.hidden, self.dense.hidden, strict=True) if self.dense else ()
        return any(not torch.equal(one, other) for one, other in pairs)

    def wanted(self, whole: Sequence[Any], batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the sliced layer should add to a batch's hidden states; the dense ones are then those after the layers.

        Args:
            whole: The dense model's layer, and the dropped ones after it.
            batch: Which batch.

        Returns:
            For its attention and for all of it, ``[B, T, H]``, and the hidden states that this leads to.
        """
        followed = self.dense or self.sliced
        attended, total, after = _added(whole, followed, batch)
        if self.dense:
            behind = self.dense.hidden[batch] - self.sliced.hidden[batch]
            attended, total = attended + behind, total + behind
            self.dense.hidden[batch] = after
        return attended, total, after


def _refit_layer(
    layer: Any, whole: Sequence[Any], streams: _Streams, folds: "_Folds", compensation: Compensation
) -> Iterator["_Fitted"]:
    """Refit a sliced layer, in place, to what should be added to the residual stream.

    Yields:
        What became of a matrix, as soon as that is in place. Nothing where all is as it was.
    """
    first, attention, down = whole[0], layer.self_attn, layer.mlp.down_proj
    parted, inputs = streams.parted(), streams.sliced
    fewer_heads = attention.o_proj.in_features < first.self_attn.o_proj.in_features
    as_it_was = not fewer_heads and down.in_features == first.mlp.down_proj.in_features and len(whole) == 1
    if as_it_was and not parted:
        if streams.dense:
            streams.dense.advance(first)
        return
    attends = fewer_heads or parted
    added: list[Tensor] = []  # [B, T, H] a batch
    weights: list[Tensor] = []  # [B, T]
    moments = folds.none(attention.o_proj) if attends else []
    for batch in range(len(inputs.hidden)):
        attended, total, after = streams.wanted(whole, batch)
        added.append(total)
        weights.append(compensation.weights(after))
        if attends:
            with _input_of(attention.o_proj) as given:
                inputs.through(layer, batch)
            folds.count(moments, batch, given[0], attended, weights[batch])
    if attends:
        yield _fitted("self_attn.o_proj", attention.o_proj, compensation, moments)
    moments = folds.none(down)
    for batch, total in enumerate(added):
        with _output_of(attention) as attended_now, _input_of(down) as given:
            inputs.through(layer, batch)
        folds.count(moments, batch, given[0], total.float() - attended_now[0].float(), weights[batch])
    yield _fitted("mlp.down_proj", down, compensation, moments)
    if compensation.learns:
        moments = []  # they are large
        yield _learned(layer, added, streams.sliced, weights, folds, compensation)


def _learned(
    layer: Any,
    added: Sequence[Tensor],
    inputs: LayerInputs,
    weights: Sequence[Tensor],
    folds: "_Folds",
    compensation: Compensation,
) -> "_Fitted":
    """Let a sliced layer's MLP learn what is still missing, in place, see ``learning``."""
    rows = list[learning.Row]()
    for batch, total in enumerate(added):
        with _output_of(layer.self_attn) as attended, _input_of(layer.mlp) as given:
            inputs.through(layer, batch)
        rows += folds.rows(batch, given[0], total - attended[0], weights[batch])
    before, after = compensation.learn(layer.mlp, rows)
    changed = [f"mlp.{name}" for name, _ in layer.mlp.named_parameters()] if after < before else []
    return _Fitted("mlp", None, before, after, changed)


def _added(layers: Sequence[Any], inputs: LayerInputs, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the first layer's attention adds to the residual stream, what all layers add, and what comes out."""
    hidden, parts = inputs.hidden[batch], []
    for layer in layers:
        with _output_of(layer.self_attn) as attended, _output_of(layer.mlp) as computed:
            hidden = inputs.through(layer, batch, hidden)
        parts += [attended[0], computed[0]]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total = total + part
    return parts[0], total, hidden


class _Fitted(NamedTuple):
    """What became of a matrix of a layer, see ``Refit.fits``; ``changed`` are names of parameters."""

    matrix: str
    setting: float | None
    left: float
    refitted: float
    changed: list[str]


def _fitted(name: str, linear: nn.Linear, compensation: Compensation, folds: Sequence[Moments]) -> _Fitted:
    """Fit a matrix and put it in place."""
    bias = None if linear.bias is None else linear.bias.double()
    fit = compensation.fit(Matrix(linear.weight.double(), bias), folds)
    changed = []
    if fit.matrix is not None:
        linear.weight.copy_(fit.matrix.weight)
        changed.append(f"{name}.weight")
        if fit.matrix.bias is not None:
            linear.bias.copy_(fit.matrix.bias)
            changed.append(f"{name}.bias")
    return _Fitted(name, fit.setting, fit.left, fit.refitted, changed)


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

    def count(self, moments: Sequence[Moments], batch: int, given: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Count a batch without padding.

        Args:
            moments: Of each part.
            batch: Which batch.
            given: What a matrix is given, ``[B, T, K]``.
            wanted: What it should give, ``[B, T, H]``.
            weights: Of tokens, ``[B, T]``.
        """
        for number, row in enumerate(self.rows(batch, given, wanted, weights), self._starts[batch]):
            moments[number % len(moments)].add(row.given, row.wanted, row.weights)

    def rows(self, batch: int, given: Tensor, wanted: Tensor, weights: Tensor) -> list[learning.Row]:
        """The same as rows without padding."""
        text = self._batches[batch]
        shape = text["input_ids"].shape  # flash attention has all rows in one
        x_BTK, y_BTH, w_BT1 = (part.flatten(0, -2).unflatten(0, shape) for part in (given, wanted, weights[..., None]))
        found = []
        for i in range(shape[0]):
            one = {name: part[i : i + 1] for name, part in text.items()}
            x_nK, y_nH, w_n1 = (tokens_of(part[i : i + 1], one) for part in (x_BTK, y_BTH, w_BT1))
            found.append(learning.Row(x_nK, y_nH, w_n1[:, 0]))
        return found
