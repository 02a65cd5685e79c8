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

_ANY_DTYPE = ("eager", "sdpa")  # attention kernels that compute in float64 too
_CONTROL = 10.0  # the negative control must differ by so many tolerances


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences of logits, in float64.

    Attributes:
        zeroed_and_sliced: Between the dense model with removed parts zeroed and the sliced model; small.
        pruned_and_dense: Between the sliced and the whole dense model; not small, or nothing was pruned.
        rolled_head: Between the sliced model and itself with one layer's o_proj rolled by a head; not small, or the
            comparison is blind to heads in the wrong place.
        largest_logit: Of the dense model with removed parts zeroed.
        tolerance: What counts as small, as a share of the largest logit.
    """

    zeroed_and_sliced: float
    pruned_and_dense: float
    rolled_head: float
    largest_logit: float
    tolerance: float

    def raise_if_failed(self) -> None:
        """Refuse a result that is not proven.

        Raises:
            ValueError: The message says which of the three comparisons failed, with its number.
        """
        small = self.tolerance * self.largest_logit
        problems = []
        if not self.zeroed_and_sliced <= small:  # also for NaN
            problems.append(
                f"logits of the sliced model differ by {self.zeroed_and_sliced:.3g} from those of the dense model with "
                f"removed parts zeroed (at most {small:.3g} is allowed, {self.tolerance:g} of the largest): weights "
                "were changed after pruning, or query heads do not belong to their key-value heads"
            )
        if not self.pruned_and_dense > small:
            problems.append(f"pruning changed nothing (logits differ by {self.pruned_and_dense:.3g})")
        if not self.rolled_head > _CONTROL * small:
            problems.append(
                f"the comparison cannot see a head in the wrong place (logits differ by {self.rolled_head:.3g})"
            )
        if problems:
            raise ValueError("verify: " + "; ".join(problems))


def proven_slice(model: Any, plan: PruningPlan, ids_BT: Tensor, tolerance: float) -> tuple[Any, Verification]:
    """The slice of a model, and how it compares with the zeroed model."""
    reference = reference_logits(model, plan, ids_BT)
    pruned = slice_model(model, plan)
    return pruned, compare(*reference, pruned, ids_BT, tolerance)


@torch.no_grad()
def reference_logits(dense: Any, plan: PruningPlan, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` of the dense model as it is, and with removed parts zeroed."""
    whole = exact_logits(dense, ids_BT)
    with removed_parts_zeroed(dense, plan):
        zeroed = exact_logits(dense, ids_BT)
    return whole, zeroed


@torch.no_grad()
def compare(whole_BTV: Tensor, zeroed_BTV: Tensor, sliced: Any, ids_BT: Tensor, tolerance: float) -> Verification:
    """Compare a sliced model with reference logits. The dense model need not be in memory any more.

    Args:
        whole_BTV: Logits of the dense model.
        zeroed_BTV: Its logits with removed parts zeroed.
        sliced: The pruned model; not changed when this returns.
        ids_BT: The token ids that the logits belong to.
        tolerance: Largest difference of logits that rounding may cause, as a share of the largest logit.
    """
    pruned = exact_logits(sliced, ids_BT)
    attention = max(decoder_layers(sliced), key=lambda layer: layer.self_attn.o_proj.in_features).self_attn
    weight = attention.o_proj.weight
    before = weight.detach().clone()
    try:
        # a head further; of a single head half of it, for a whole turn changes nothing
        step = attention.head_dim if weight.shape[1] > attention.head_dim else max(1, attention.head_dim // 2)
        weight.copy_(before.roll(step, 1))
        rolled = exact_logits(sliced, ids_BT)
    finally:
        weight.copy_(before)
    return Verification(
        zeroed_and_sliced=float((pruned - zeroed_BTV).abs().max()),
        pruned_and_dense=float((pruned - whole_BTV).abs().max()),
        rolled_head=float((rolled - pruned).abs().max()),
        largest_logit=float(zeroed_BTV.abs().max()),
        tolerance=tolerance,
    )


@torch.no_grad()
def exact_logits(model: Any, ids_BT: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` in float64, whatever the model's weights are in.

    In float32, zeros that are added in another order change the logits of a deep model by as much as a small mistake
    does; in float64 only mistakes are left.
    """
    with in_float64(model):
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Within the block the model computes in float64; afterwards its parameters are the same tensors as before.

    Embeddings, each decoder layer, the last norm and the head get float64 weights only while they are at work. So
    memory is the model in its own dtype, the largest of these modules at eight bytes a parameter, and activations and
    logits at eight bytes a number. Norms and rotary angles stay in float32, as transformers computes them. An attention
    kernel that knows half precision alone (flash attention) makes room for torch's, which knows float64.
    """
    kernel = model.config._attn_implementation
    before: dict[Any, Tensor] = {}

    def widen(module: Any, arguments: Any) -> None:
        for parameter in module.parameters():
            before[parameter] = parameter.data
            parameter.data = parameter.data.double()

    def narrow(module: Any, arguments: Any, output: Any) -> None:
        for parameter in module.parameters():
            parameter.data = before.pop(parameter)

    parts = [model.get_input_embeddings(), *decoder_layers(model), model.model.norm, model.get_output_embeddings()]
    handles = [part.register_forward_pre_hook(widen) for part in parts]
    handles += [part.register_forward_hook(narrow) for part in parts]
    try:
        model.config._attn_implementation = kernel if kernel in _ANY_DTYPE else "sdpa"
        yield
    finally:
        model.config._attn_implementation = kernel
        for handle in handles:
            handle.remove()
        for parameter, data in before.items():  # of a module in which the forward pass failed
            parameter.data = data


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
