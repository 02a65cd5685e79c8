"""FSDP2's modules as units of communication, and the one place that touches its private attributes.

FSDP2 keeps every parameter apart: each is padded on dim 0 to a multiple of n ranks and cut into n pieces. Gradients are
reduced from ``[n, s]``, row r holding rank r's piece of every parameter, one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from common.names import clean_name
from strategies.traffic import Traffic
from strategies.units import ParameterSlice, Unit, prefix_of


@dataclass
class ShardedModule:
    """One FSDP2 module that owns parameters.

    Attributes:
        module: The module itself.
        unit: Its gradient ``[n·s]``; None when none of its parameters is trained.
        gathered: Its parameters ``[n·s]``, frozen ones included.
        replicas: The group that holds copies of this rank's shard (HSDP), if any.
    """

    module: FSDPModule
    unit: Unit | None
    gathered: Unit
    replicas: dist.ProcessGroup | None
    _parameters: list[Any]

    def master_shard(self) -> Tensor:
        """This rank's shard of all parameters in the dtype the optimizer sees (fp32), padded: ``[s]``, a new tensor.

        FSDP2 casts to the compute dtype before it hands a shard to the all-gather; this is the shard from before.
        """
        return torch.cat([p._sharded_param_data for p in self._parameters])


def sharded_modules(root: nn.Module, traffic: Traffic) -> list[ShardedModule]:
    """Every FSDP2 module in ``root`` that owns parameters, in the order of ``root.modules()``.

    Raises:
        ValueError: A parameter is sharded on another dimension than 0.
    """
    found = []
    for name, module in root.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in _groups(module):
            names = {id(m): clean_name(path) for path, m in module.named_modules()}
            label, ranks = clean_name(name) or "root", group.mesh_info.shard_process_group
            trained = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
            units = [
                Unit(
                    label,
                    list(_slices(part, names, ranks.size())),
                    _width(part) * ranks.size(),
                    ranks,
                    traffic,
                    prefix=prefix_of(label),
                )
                for part in (trained, group.fsdp_params)
            ]
            replicas = getattr(group.mesh_info, "replicate_process_group", None)
            found.append(ShardedModule(module, units[0] if trained else None, units[1], replicas, group.fsdp_params))
    return found


def replicated_shards(root: nn.Module) -> Iterator[tuple[dist.ProcessGroup | None, list[Tensor]]]:
    """Of every group of parameters the ranks that hold the same shards, where torch knows any, and this rank's."""
    for module in root.modules():
        for group in _groups(module) if isinstance(module, FSDPModule) else ():
            replicas = getattr(group.mesh_info, "replicate_process_group", None)
            yield replicas, [p._sharded_param_data for p in group.fsdp_params]


def shard_group(root: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share a sharded model; None where nothing is sharded."""
    groups = (group for module in root.modules() if isinstance(module, FSDPModule) for group in _groups(module))
    first = next(groups, None)
    return None if first is None else first.mesh_info.shard_process_group


def _groups(module: FSDPModule) -> list[Any]:
    """torch 2.13 keeps a list of parameter groups, older versions at most one."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def _width(parameters: list[Any]) -> int:
    """Elements s of one rank's shard, padding included."""
    return sum(p.padded_sharded_param_size.numel() for p in parameters)


def _slices(parameters: list[Any], names: dict[int, str], n: int) -> Iterator[ParameterSlice]:
    """Every rank's piece of every parameter, in the order of ``[n, s]``; what lies between them is padding."""
    offset = 0
    for rank in range(n):
        for p in parameters:
            padded, info = p.padded_sharded_param_size, p._module_info
            fqn = ".".join(part for part in (names[id(info.module)], info.param_name) if part)
            if p.fsdp_placement.dim != 0:
                raise ValueError(f"{fqn} is sharded on dimension {p.fsdp_placement.dim}; only 0 can be compressed")
            rows = min(max(p._orig_size[0] - rank * padded[0], 0), padded[0])
            if rows:
                yield ParameterSlice(fqn, (rows, *p._orig_size[1:]), offset)
            offset += padded.numel()
