"""What a unit of communication is, and the one place that touches FSDP1's private attributes.

FSDP1 gives a communication hook two tensors and no name: identical transformer blocks cannot be told apart. Assigning
each wrapped module its own hook and state is what makes per-unit state and per-unit counters possible.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, _runtime_utils
from torch.distributed.fsdp._common_utils import TrainingState

from common.names import clean_name
from strategies.traffic import Traffic


@dataclass(frozen=True)
class ParameterSlice:
    """Where one parameter lies in a unit's flat gradient.

    Attributes:
        fqn: Fully qualified name in the wrapped module, without wrapper prefixes.
        shape: Shape of the whole parameter.
        offset: First element in the flat gradient.
    """

    fqn: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return torch.Size(self.shape).numel()


@dataclass
class Unit:
    """One FSDP unit as a compressor sees it.

    Attributes:
        name: Name of the wrapped module, "root" for the outermost one.
        parameters: The parameters in the flat gradient, in order; everything between and after them is padding.
        numel: Elements of the flat gradient, padding included; a multiple of ``world_size`` unless unsharded.
        group: The process group that shares the gradient; None is the default group.
        traffic: The counters of this rank.
        seed: The run's seed.
        step: Optimizer steps completed before this one; the engine sets it before every reduction.
        state: What a method keeps between steps, by name. Names that start with "residual" or "momentum" hold gradients
            of this rank that have yet to be sent, shaped like the flat gradient.
        padding: Ranges ``[start, stop)`` of the flat gradient that are no parameter; by default everything that
            ``parameters`` leaves out (nothing when there are none).
        part: Which part of the unit's gradient this is, when a method treats parts apart.
        level: "intra" or "inter" where gradients are reduced inside groups of ranks first and then between them.
        shard: Which one of how many shards of a gradient this is the whole of; ranks of other shards hold other units
            under the same name.
        prefix: What makes a parameter's name here its full name: the wrapped module's, or nothing.
    """

    name: str
    parameters: list[ParameterSlice]
    numel: int
    group: dist.ProcessGroup | None
    traffic: Traffic = field(repr=False)
    seed: int = 0
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    padding: list[tuple[int, int]] | None = field(default=None, repr=False)
    part: str = ""
    level: str = ""
    shard: tuple[int, int] = (0, 1)
    prefix: str = ""

    def __post_init__(self) -> None:
        self.world_size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        if self.padding is None:
            self.padding = _gaps(self.parameters)

    @property
    def valid_numel(self) -> int:
        """Elements that are parameters, not padding."""
        return sum(p.numel for p in self.parameters)

    def padding_within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Padding inside ``[start, stop)`` of the flat gradient, relative to ``start``."""
        inside = ((max(a, start) - start, min(b, stop) - start) for a, b in self.padding or ())
        return [(a, b) for a, b in inside if a < b]

    def clear_padding(self, part: Tensor, start: int) -> None:
        """Zero the padding in ``part [m]``, which lies at ``start`` in the flat gradient."""
        for a, b in self.padding_within(start, start + part.numel()):
            part[a:b].zero_()

    def compact(self, numel: int, part: str) -> "Unit":
        """A unit for ``numel`` elements taken out of this one: same counters, no padding, its own random numbers."""
        return replace(self, parameters=[], numel=numel, state={}, padding=[], part=f"{self.part}/{part}")


def shard_between(unit: Unit, numel: int, replicas: dist.ProcessGroup) -> Unit:
    """This rank's shard of ``unit``'s gradient ``[numel]`` (padding included) as a unit that replicas reduce.

    A parameter that begins or ends in another rank's shard is a vector here.
    """
    size = numel // unit.world_size
    start, stop = unit.rank * size, (unit.rank + 1) * size
    slices = []
    for parameter in unit.parameters:
        first, last = max(parameter.offset, start), min(parameter.offset + parameter.numel, stop)
        if first < last:
            whole = last - first == parameter.numel
            slices.append(ParameterSlice(parameter.fqn, parameter.shape if whole else (last - first,), first - start))
    padding = unit.padding_within(start, stop)
    shard = (unit.rank, unit.world_size)
    own: dict[str, Any] = {"padding": padding, "level": "inter", "shard": shard, "prefix": unit.prefix}
    return Unit(f"{unit.name} between replicas", slices, size, replicas, unit.traffic, **own)


def _gaps(parameters: list[ParameterSlice]) -> list[tuple[int, int]]:
    """What lies between and after the parameters; a flat gradient may be padded further at any time."""
    gaps, position = [], 0
    for parameter in parameters:
        if parameter.offset > position:
            gaps.append((position, parameter.offset))
        position = parameter.offset + parameter.numel
    return [*gaps, (position, 1 << 62)] if parameters else []


def fsdp_units(root: FSDP, traffic: Traffic) -> Iterator[tuple[FSDP, Unit]]:
    """Yield every FSDP module that holds parameters, with its unit.

    Raises:
        ValueError: A unit holds both trained and frozen parameters: FSDP1 would reduce all of them.
    """
    for name, module in root.named_modules():
        if not isinstance(module, FSDP) or module._handle is None:
            continue
        flat = module._handle.flat_param
        clean = clean_name(name) or "root"
        trained = [fqn for fqn, p in zip(flat._fqns, flat._params or (), strict=False) if p.requires_grad]
        if is_trained(module) and len(trained) < len(flat._params or ()):
            raise mixed(f"{clean}.{trained[0]}")
        slices, numel, prefix = list(_slices(flat)), _padded_numel(module), prefix_of(clean)
        yield module, Unit(clean, slices, numel, module.process_group, traffic, prefix=prefix)


def prefix_of(module: str) -> str:
    """See ``Unit.prefix``, of a unit that is named after its module."""
    return "" if module == "root" else f"{module}."


def flat_unit(
    name: str, parameters: list[tuple[str, tuple[int, ...]]], group: dist.ProcessGroup | None, traffic: Traffic
) -> Unit:
    """A unit as FSDP1 would lay it out: every parameter (name, shape) begins at a multiple of 16 bytes of float32."""
    slices, offset = [], 0
    for fqn, shape in parameters:
        slices.append(ParameterSlice(fqn, shape, offset))
        offset += -(-slices[-1].numel // 4) * 4
    ranks = dist.get_world_size(group)
    return Unit(name, slices, -(-offset // ranks) * ranks, group, traffic, prefix=prefix_of(name))


def is_trained(module: FSDP) -> bool:
    """Whether a parameter of this FSDP module's own unit is trained."""
    flat = module._handle.flat_param
    return any(p.requires_grad for p in (flat._params if flat._params is not None else [flat]))


def mixed(parameter: str) -> ValueError:
    """What to raise when FSDP1 would reduce frozen parameters along with ``parameter``."""
    return ValueError(
        f"{parameter} is trained and shares an FSDP1 unit with frozen parameters, whose gradients would be sent too. "
        "Use CompressedFSDP2, which reduces only what is trained (--trainer.strategy.class_path CompressedFSDP2)"
    )


def _padded_numel(module: FSDP) -> int:
    handle = module._handle
    sharded = module.sharding_strategy != ShardingStrategy.NO_SHARD
    return handle.flat_param._sharded_size.numel() * (handle.world_size if sharded else 1)


def _slices(flat_param: Tensor) -> Iterator[ParameterSlice]:
    """With ``use_orig_params`` the flat parameter interleaves parameters and alignment padding."""
    entries = iter(zip(flat_param._fqns, flat_param._shapes, strict=True))
    offset = 0
    for numel, padding in zip(flat_param._numels_with_padding, flat_param._is_padding_mask, strict=True):
        if not padding:
            fqn, shape = next(entries)
            yield ParameterSlice(fqn, tuple(shape), offset)
        offset += numel


def install_hook(module: FSDP, unit: Unit, hook: Callable[..., None]) -> None:
    """Give one FSDP module its own communication hook, called as ``hook(unit, grad[, output])``.

    The public ``register_comm_hook`` sets one state for all modules, and refuses HYBRID_SHARD; so does this.
    """
    if module.sharding_strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2):
        raise ValueError(
            f"unit {unit.name!r}: a communication hook would skip the inter-node reduction of HYBRID_SHARD"
        )
    module._comm_hook, module._comm_hook_state = hook, unit


def count_parameter_gathers(module: FSDP, unit: Unit, collect: Callable[[Tensor, Tensor, Unit], Any]) -> None:
    """Count and time the parameter all-gathers of this module.

    Args:
        module: One FSDP module.
        unit: Its unit.
        collect: Gathers and counts on CPUs, where torch's own all-gather takes turns (see ``transport``): this rank's
            shard, where all go, and the unit.
    """
    handle = module._handle
    gather = type(handle)._all_gather_flat_param.__get__(handle)  # its own, also when this is called again

    def counted(unsharded: Tensor) -> Tensor:
        if unsharded.is_cpu:
            collect(handle.flat_param.data, unsharded, unit)
            return unsharded
        with unit.traffic.timed(unit.name, "wire", unsharded.device, "all_gather", parameters=True):
            result = gather(unsharded)
        unit.traffic.called(unit.name, "all_gather")
        sent = unsharded.nbytes // unit.world_size * (unit.world_size - 1)
        unit.traffic.sent(unit.name, "all_gather", "parameters", sent)
        unit.traffic.gathers(unsharded.numel(), unit.world_size)
        return result

    handle._all_gather_flat_param = counted  # type: ignore[method-assign]


def begin_forward(root: FSDP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What FSDP1 does before the root's forward: its parameters are gathered; the arguments, in the compute dtype."""
    args, kwargs = _runtime_utils._root_pre_forward(root, root, args, kwargs)
    unshard, inner = _runtime_utils._pre_forward_unshard, root._fsdp_wrapped_module
    return _runtime_utils._pre_forward(root, root._handle, unshard, inner, args, kwargs)


def end_forward(root: FSDP, output: Tensor | None) -> None:
    """What FSDP1 does after the root's forward, so that a backward pass from ``output`` may begin."""
    if root.training_state == TrainingState.FORWARD_BACKWARD:
        _runtime_utils._post_forward(root, root._handle, _runtime_utils._post_forward_reshard, root, None, output)
