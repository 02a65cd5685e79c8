"""Matrices that are cut up over ranks (FSDP1, FSDP2): masks that are cut alike, and the whole of them to prune.

Training holds masks on what each rank has. An iteration needs whole matrices, a layer at a time: the first rank gathers
the model in host memory, prunes it there, and hands out what it found.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only parts of the model's parameters."""
    return any(isinstance(module, FSDP) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def cut_masks(model: nn.Module, matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of every mask what belongs to this rank's part of the matrix, bool in its shape; on its device.

    All ranks must call it together.

    Args:
        model: What the engine made of the model.
        matrices: Linear layers by name.
        keep: Their whole masks.
    """
    if not is_sharded(model):
        return {name: mask.to(matrices[name].weight.device) for name, mask in keep.items()}
    if isinstance(next(iter(matrices.values())).weight, DTensor):
        found = {}
        for name, mask in keep.items():
            weight: Any = matrices[name].weight
            here = mask.to(weight.device)
            found[name] = distribute_tensor(here, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
        return found
    # FSDP1 says nowhere in public how it cuts: have it cut the masks in the weights' place
    whole: Any = model
    mine = {name: matrices[name].weight.detach().clone() for name in keep}
    with FSDP.summon_full_params(whole, writeback=True):
        for name, mask in keep.items():
            matrices[name].weight.copy_(mask)
    found = {name: matrices[name].weight != 0 for name in keep}
    for name, weight in mine.items():
        matrices[name].weight.copy_(weight)
    return found


def gather(model: nn.Module) -> dict[str, Tensor]:
    """The whole state on the first rank, in host memory; nothing elsewhere. All ranks must call it together."""
    # on a CPU torch 2.13 frees what it "offloads" to where it is already (pytorch-lightning issue 21804)
    offload = next(model.parameters()).device.type != "cpu"
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=offload))
    if torch.distributed.get_rank():
        return {}
    return {name: tensor.cpu() for name, tensor in state.items()}


def hand_out(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every rank its part of what the first rank has. All ranks must call it together."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)
