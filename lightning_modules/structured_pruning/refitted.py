"""What a compensation has changed of a slice: how a plan says it, how it is put there again, and that it is no more."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.structured_pruning.needs import add_output_biases
from lightning_modules.structured_pruning.plan import PruningPlan
from lightning_modules.structured_pruning.provenance import tensors_hash

SETTING = "compensation"
"""Where a plan's settings say what was refitted, see ``refitting.compensate``."""


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
