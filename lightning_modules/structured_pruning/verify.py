"""Proof that a sliced model computes what the dense one does with the same parts zeroed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.structured_pruning.layers import decoder_layers, rows_of, shape_of
from lightning_modules.structured_pruning.plan import PruningPlan
from lightning_modules.structured_pruning.slicing import slice_model

_CONTROL = 10.0  # the negative control must differ by so many tolerances


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences of logits.

    Attributes:
        zeroed_and_sliced: Between the dense model with removed parts zeroed and the sliced model; small.
        pruned_and_dense: Between the sliced and the whole dense model; not small, or nothing was pruned.
        rolled_head: Between the sliced model and itself with one layer's o_proj rolled by a head; not small, or the
            comparison is blind to heads in the wrong place.
        tolerance: What counts as small.
    """

    zeroed_and_sliced: float
    pruned_and_dense: float
    rolled_head: float
    tolerance: float

    def raise_if_failed(self) -> None:
        """Refuse a result that is not proven.

        Raises:
            ValueError: The message says which of the three comparisons failed, with its number.
        """
        problems = []
        if not self.zeroed_and_sliced <= self.tolerance:  # also for NaN
            problems.append(
                f"logits of the sliced model differ by {self.zeroed_and_sliced:.3g} from those of the dense model with "
                f"removed parts zeroed (at most {self.tolerance:g} is allowed): weights were changed after pruning, "
                "or query heads do not belong to their key-value heads"
            )
        if not self.pruned_and_dense > self.tolerance:
            problems.append(f"pruning changed nothing (logits differ by {self.pruned_and_dense:.3g})")
        if not self.rolled_head > _CONTROL * self.tolerance:
            problems.append(
                f"the comparison cannot see a head in the wrong place (logits differ by {self.rolled_head:.3g})"
            )
        if problems:
            raise ValueError("verify: " + "; ".join(problems))


def proven_slice(model: Any, plan: PruningPlan, ids_BT: Tensor, tolerance: float) -> tuple[Any, Verification]:
    """The slice of a model, and how it compares, in float32, with the zeroed model."""
    with in_float32(model):
        reference = reference_logits(model, plan, ids_BT)
    pruned = slice_model(model, plan)
    with in_float32(pruned):
        return pruned, compare(*reference, pruned, ids_BT, tolerance)


@torch.no_grad()
def reference_logits(dense: Any, plan: PruningPlan, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` of the dense model as it is, and with removed parts zeroed."""
    whole = dense(input_ids=ids_BT, use_cache=False).logits
    with removed_parts_zeroed(dense, plan):
        zeroed = dense(input_ids=ids_BT, use_cache=False).logits
    return whole, zeroed


@torch.no_grad()
def compare(whole_BTV: Tensor, zeroed_BTV: Tensor, sliced: Any, ids_BT: Tensor, tolerance: float) -> Verification:
    """Compare a sliced model with reference logits. The dense model need not be in memory any more.

    Args:
        whole_BTV: Logits of the dense model.
        zeroed_BTV: Its logits with removed parts zeroed.
        sliced: The pruned model; not changed when this returns.
        ids_BT: The token ids that the logits belong to.
        tolerance: Largest absolute difference of logits that rounding may cause.
    """

    def logits() -> Tensor:
        result: Tensor = sliced(input_ids=ids_BT, use_cache=False).logits
        return result

    pruned = logits()
    attention = max(decoder_layers(sliced), key=lambda layer: layer.self_attn.o_proj.in_features).self_attn
    weight = attention.o_proj.weight
    before = weight.detach().clone()
    try:
        weight.copy_(before.roll(attention.head_dim, 1))
        rolled = logits()
    finally:
        weight.copy_(before)
    return Verification(
        zeroed_and_sliced=float((pruned - zeroed_BTV).abs().max()),
        pruned_and_dense=float((pruned - whole_BTV).abs().max()),
        rolled_head=float((rolled - pruned).abs().max()),
        tolerance=tolerance,
    )


@contextmanager
@torch.no_grad()
def removed_parts_zeroed(model: Any, plan: PruningPlan) -> Iterator[None]:
    """Within the block, all weights and biases of removed parts are zero; afterwards they are as before, bit by bit."""
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    plan.check_fits(shapes)
    undo: list[tuple[Tensor, Any, Tensor]] = []

    def zero(weight: Tensor | None, at: Any) -> None:
        if weight is not None:
            undo.append((weight, at, weight[at].clone()))
            weight[at] = 0

    try:
        for layer, kept, shape in zip(decoder_layers(model), plan.layers, shapes, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            device = attention.o_proj.weight.device
            heads = _others(kept.queries(shape.n_rep), shape.groups * shape.n_rep)
            rows = {"q": rows_of(heads, shape.head_dim).to(device)}
            rows["kv"] = rows_of(_others(kept.groups, shape.groups), shape.head_dim).to(device)
            channels = torch.as_tensor(_others(kept.channels, shape.channels), dtype=torch.long, device=device)
            for linear, at in (
                (attention.q_proj, rows["q"]),
                (attention.k_proj, rows["kv"]),
                (attention.v_proj, rows["kv"]),
                (mlp.gate_proj, channels),
                (mlp.up_proj, channels),
            ):
                zero(linear.weight, at)
                zero(linear.bias, at)
            zero(attention.o_proj.weight, (slice(None), rows["q"]))
            zero(mlp.down_proj.weight, (slice(None), channels))
            if kept.dropped:  # output biases belong to the layer
                zero(attention.o_proj.bias, slice(None))
                zero(mlp.down_proj.bias, slice(None))
        yield
    finally:
        for weight, at, before in reversed(undo):
            weight[at] = before


def _others(kept: list[int], count: int) -> list[int]:
    return sorted(set(range(count)) - set(kept))


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Within the block, all parameters are float32; afterwards they have their dtype again, with the same bits.

    Buffers stay as they are: rotary frequencies are float32 whatever the model is.
    """
    dtype = model.dtype

    def cast(to: torch.dtype) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(to)

    cast(torch.float32)
    try:
        yield
    finally:
        cast(dtype)
