"""What an engine holds and sends on so many ranks: its own code, on tensors without memory, among ranks not there.

Nothing is estimated that the engine knows itself. It shards the model, encodes gradients and counts what it hands to
collectives as ever; only tensors are on the "meta" device, and the process group answers at once (torch's own fake
group). So methods need no formulas here, and what is planned is what is counted.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, ShardingStrategy

from lightning_modules.frozen import Frozen
from strategies import (
    CompressedDDP,
    CompressedDiLoCo,
    CompressedFSDP,
    CompressedFSDP2,
    ShardedDiLoCo,
    transport,
)
from strategies.compressors import uncompressed
from strategies.ddp_buckets import planned_units
from strategies.engine import CompressedEngine
from strategies.fsdp2_collectives import EncodedAllGather, count_replica_all_reduce
from strategies.fsdp2_units import sharded_modules
from strategies.units import Unit, flat_unit
from strategies.wrapping import chosen_blocks, trained_apart

Backend = Literal["gloo", "nccl"]
_FP32 = 4
_GATHERED_UNITS = 2  # the one that computes, and the next one, which is already being gathered


@dataclass
class Planned:
    """What a rank holds, and what it sends in an optimizer step.

    Attributes:
        parameters: Of the whole model; ``trained`` are those that get gradients.
        trained: See ``parameters``.
        units: What is reduced on its own.
        held: Bytes in a rank's memory by what they are.
        sent: Bytes that leave a rank in a step, by "gradients" and "parameters".
        inter: The part of ``sent`` that leaves its node; the mean over a node's ranks.
    """

    parameters: int = 0
    trained: int = 0
    units: int = 0
    held: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inter: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@contextmanager
def absent_ranks(world_size: int, backend: Backend) -> Iterator[None]:
    """Be rank 0 of a group whose other ranks are not there: its collectives return at once.

    Raises:
        RuntimeError: This process has joined a group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("a plan is made in a process of its own: this one has joined other ranks")
    factor = 2 if backend == "gloo" else 1
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with mock.patch.object(transport, "reduce_scatter_factor", lambda group: factor):
            yield
    finally:
        dist.destroy_process_group()


def planned(
    trainer: L.Trainer, module: L.LightningModule, node_size: int, backend: Backend = "gloo", step: int = 100_000
) -> Planned:
    """Shard a module as its trainer's strategy would, and count.

    Args:
        trainer: Has one of Pare's engines, or one rank, and as many nodes and devices as are planned for.
        module: Its ``configure_model`` builds the model.
        node_size: Ranks of a node.
        backend: Who moves bytes; gloo's own reduce-scatter sends twice what it must.
        step: Optimizer steps made before the one that is planned, for methods that go by them.

    Raises:
        ValueError: The strategy is no engine of Pare's, or cannot have so many ranks.
    """
    engine: Any = trainer.strategy
    compressed = isinstance(engine, CompressedEngine)
    if not compressed and not isinstance(engine, SingleDeviceStrategy):
        raise ValueError(
            f"trainer.strategy {type(engine).__name__} cannot be planned; give CompressedDDP, CompressedFSDP, "
            "CompressedFSDP2 or CompressedDiLoCo, or one rank"
        )
    world_size = trainer.num_nodes * trainer.num_devices
    if compressed:
        engine.check_ranks(world_size)
    with absent_ranks(world_size, backend), _at(engine, step) if compressed else nullcontext():
        engine.connect(module)
        if compressed:
            engine.set_world_ranks()
        precision = engine.precision_plugin
        with torch.device("meta"), precision.module_init_context():
            module.trainer = trainer
            module.configure_model()
        module = precision.convert_module(module.to("meta"))
        count = _Count(trainer, module, node_size)
        with mock.patch.object(transport, "count", count.note):
            return count.all()


@contextmanager
def _at(engine: Any, step: int) -> Iterator[None]:
    """Let methods believe that so many steps have been made."""

    def tell(unit: Unit) -> None:
        unit.seed, unit.step = 0, step

    with mock.patch.object(engine, "_tell_time", tell):
        yield


class _Count:
    """One configuration's bytes."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, node_size: int) -> None:
        self.trainer, self.module, self.node_size = trainer, module, node_size
        self.engine: Any = trainer.strategy
        self.world_size = trainer.num_nodes * trainer.num_devices
        self.batches = trainer.accumulate_grad_batches
        whole = list(module.parameters())
        trained = sum(p.numel() for p in whole if p.requires_grad)
        self.found = Planned(sum(p.numel() for p in whole), trained)
        self.units: list[Unit] = []
        self._noted: list[tuple[dist.ProcessGroup | None, str, str, int]] = []

    def note(self, unit: Unit, collective: str, role: str, nbytes: int) -> None:
        """See ``transport.count``: with the group, since a method may reduce among groups of its own."""
        self._noted.append((unit.group, collective, role, nbytes))

    def all(self) -> Planned:
        """Count everything."""
        engine, held = self.engine, self.found.held
        if isinstance(engine, CompressedEngine) and engine.compressor is None:  # torch's own path, which nobody counts
            engine.compressor = uncompressed()
        if buffers := sum(b.nbytes for b in self.module.buffers()):
            held["buffers"] = float(buffers)
        frozen = [value.model for value in vars(self.module).values() if isinstance(value, Frozen)]
        if frozen:
            held["frozen models, whole"] = float(sum(p.nbytes for model in frozen for p in model.parameters()))
        if self.world_size == 1:
            self._held_whole()
        elif isinstance(engine, CompressedDiLoCo):
            self._diloco()
        elif isinstance(engine, CompressedDDP):
            self._ddp()
        elif isinstance(engine, CompressedFSDP2):
            self._fsdp2()
        elif isinstance(engine, CompressedFSDP):
            self._fsdp1()
        state = sum(part.nbytes for unit in self.units for part in unit.state.values())
        if state:
            held["what the compressor keeps"] = float(state)
        self.found.units = len(self.units)
        return self.found

    # Engines.

    def _ddp(self) -> None:
        engine = self.engine
        self._held_whole()
        group, reduce = None, engine._reduce_replicated
        if engine.replicas > 1:
            group, replicas = engine._groups()
        units = planned_units(self.module, engine.bucket_cap_mb, engine.traffic, group)
        if engine.replicas > 1:
            reduce = engine._on_two_levels(units, replicas)
            self.units = list(engine.units)
        else:
            self.units = units
        dtype = next(p.dtype for p in self.module.parameters() if p.requires_grad)
        self.found.held["buckets"] = float(dtype.itemsize * sum(unit.numel for unit in units))
        self._reduce(units, lambda unit, grad: reduce(unit, grad), dtype=dtype)

    def _diloco(self) -> None:
        engine = self.engine
        self._held_whole()
        engine._setup_model(self.module)
        self.units = engine.outer.units
        self._meetings()

    def _meetings(self) -> None:
        """What replicas that train by themselves hold and send besides."""
        engine = self.engine
        outer = engine.outer
        weights = _FP32 * sum(unit.numel for unit in outer.units)
        parts = max(sum(piece.unit.numel for piece in fragment.pieces) for fragment in outer.fragments)
        self.found.held["common weights and their velocity"] = 2.0 * weights
        self.found.held["pseudo-gradients"] = float(_FP32 * parts)
        every = engine.meetings.every
        self._reduce(outer.units, lambda unit, grad: engine._reduce_progress(unit, grad, 1), share=1 / every)

    def _fsdp2(self) -> None:
        engine, model, held = self.engine, self.module, self.found.held
        if engine.replicas == 1:
            names = ("data_parallel", "tensor_parallel")
            engine._device_mesh = init_device_mesh("cpu", (self.world_size, 1), mesh_dim_names=names)
        if not any(isinstance(each, FSDPModule) for each in model.modules()):
            engine._shard(model)
        engine._install(model)
        self.units = list(engine.units)
        parameters = [(_local(p), p) for p in model.parameters()]
        held["parameters"] = float(sum(own.nbytes for own, _ in parameters))
        held["gradients"] = float(sum(own.nbytes for own, p in parameters if p.requires_grad))
        held["optimizer"] = self._optimizer(model)
        by_name = {unit.name: unit for unit in engine.units}
        gathered, width = [], torch.empty((), dtype=_gathered_dtype(engine, model)).element_size()
        for sharded in sharded_modules(model, engine.traffic):
            ranks, differences = sharded.gathered.world_size, engine.parameter_differences
            if ranks == 1:
                continue
            codec = engine.parameter_compressor
            gather: Any = EncodedAllGather(sharded, codec) if differences else engine.gather(sharded)
            numel = sharded.gathered.numel
            shard = torch.empty(numel // ranks, dtype=_gathered_dtype(engine, model), device="meta")
            gather(torch.empty(numel, dtype=shard.dtype, device="meta"), shard, sharded.gathered.group)
            twice = engine.sharding_strategy == ShardingStrategy.FULL_SHARD and sharded.module is not model
            within = engine.backward_within if twice else None
            times = 1 if differences else self.batches * (2 if twice and within is None else 1)
            self._take(times)
            if within is not None:
                near = dist.new_group(range(within))
                gather(torch.empty(numel, dtype=shard.dtype, device="meta"), shard.new_empty(numel // within), near)
                self._take(self.batches)
                held["parameters within a node"] += shard.element_size() * numel / within
            if differences:  # the model as all know it, and this rank's part of that for checkpoints
                held["parameters as all know them"] += shard.element_size() * (numel + numel // ranks)
            gathered.append((numel * width, sharded.unit.numel * _FP32 if sharded.unit is not None else 0))
            if sharded.unit is not None and sharded.replicas is not None:
                unit = by_name[sharded.unit.name]
                whole = torch.empty(unit.numel // unit.world_size, dtype=torch.float32, device="meta")
                count_replica_all_reduce(unit, sharded.replicas)(whole)
                self._take()
        self._gathered(gathered)
        inside = [unit for unit in engine.units if unit.level != "inter"]

        def reduce(unit: Unit, grad: Tensor) -> None:
            shard = torch.empty_like(grad[: grad.numel() // unit.world_size])
            engine._reduce_sharded(unit, grad, shard)
            if engine.replica_compressor is not None and engine.reduces_between:
                engine._reduce_between(by_name[f"{unit.name} between replicas"], shard)

        self._reduce(inside, reduce)
        if isinstance(engine, ShardedDiLoCo):
            self._meetings()

    def _fsdp1(self) -> None:
        engine, held = self.engine, self.found.held
        blocks = chosen_blocks(self.module, engine.block_classes)
        apart = trained_apart(self.module, blocks)
        units = list(_flat_units(self.module, blocks, apart, engine))
        sharded = engine.sharding_strategy != ShardingStrategy.NO_SHARD
        ranks = self.world_size if sharded else 1
        numel = {unit.name: unit.numel for unit, _ in units}
        own = sum(numel.values()) // ranks
        trained = sum(unit.numel for unit, is_trained in units if is_trained) // ranks
        width = next(p for p in self.module.parameters()).element_size()
        held["parameters"], held["gradients"] = float(width * own), float(width * trained)
        held["optimizer"] = self._optimizer(self.module) * trained / max(self.found.trained, 1)
        self.units = [unit for unit, is_trained in units if is_trained]
        dtype = _gathered_dtype(engine, self.module)
        with warnings.catch_warnings():  # Lightning warns of *-true at every look
            warnings.simplefilter("ignore")
            reduced = engine.mixed_precision_config.reduce_dtype or torch.float32
        if sharded:
            gathered = []
            for unit, is_trained in units:
                whole = torch.empty(unit.numel, dtype=dtype, device="meta")
                transport.gather_parameters(whole[: unit.numel // ranks], whole, unit)
                twice = engine.sharding_strategy == ShardingStrategy.FULL_SHARD and unit.name != "root"
                self._take(self.batches * (2 if twice else 1))
                gathered.append((whole.nbytes, reduced.itemsize * unit.numel if is_trained else 0))
            self._gathered(gathered)

        def reduce(unit: Unit, grad: Tensor) -> None:
            if sharded:
                engine._reduce_sharded(unit, grad, torch.empty_like(grad[: grad.numel() // ranks]))
            else:
                engine._reduce_replicated(unit, grad)

        self._reduce(self.units, reduce, dtype=reduced)

    # What they have in common.

    def _held_whole(self) -> None:
        parameters = list(self.module.parameters())
        self.found.held["parameters"] = float(sum(p.nbytes for p in parameters))
        self.found.held["gradients"] = float(sum(p.nbytes for p in parameters if p.requires_grad))
        self.found.held["optimizer"] = self._optimizer(self.module)

    def _gathered(self, units: list[tuple[int, int]]) -> None:
        """Whole units while they compute, and the whole gradient of the largest; by (parameters, gradient) in bytes."""
        largest = sorted((parameters for parameters, _ in units), reverse=True)[:_GATHERED_UNITS]
        self.found.held["gathered units"] = float(sum(largest) + max((grad for _, grad in units), default=0))

    def _optimizer(self, model: nn.Module) -> float:
        """Bytes of this rank's optimizer state: that of a step, taken on tensors without memory."""
        steps = mock.PropertyMock(return_value=1000)
        with mock.patch.object(L.Trainer, "estimated_stepping_batches", steps):
            configured: Any = self.module.configure_optimizers()
            optimizers = _configure_optimizers(configured)[0]
        total = 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group |= {name: False for name in ("fused", "foreach") if name in group}
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            states = [value for state in optimizer.state.values() for value in state.values()]
            total += sum(_local(value).nbytes for value in states if isinstance(value, Tensor))
            optimizer.zero_grad()
        return float(total)

    def _reduce(
        self,
        units: list[Unit],
        reduce: Callable[[Unit, Tensor], None],
        share: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reduce a gradient of every unit; of those that are laid out alike one, and it counts for all."""
        alike: dict[Any, list[Unit]] = defaultdict(list)
        for unit in units:
            layout = tuple((_numbered(p.fqn), p.shape, p.offset) for p in unit.parameters)
            alike[_numbered(unit.name), unit.numel, layout].append(unit)
        known = {unit.name: unit for unit in self.units}
        for same in alike.values():
            for _ in range(2):  # a method may send more when it begins
                self._noted.clear()
                grad = torch.empty(same[0].numel, dtype=dtype, device="meta")
                reduce(same[0], grad)
            between = known.get(f"{same[0].name} between replicas")
            self._take(len(same) * share)
            for unit in same[1:]:
                unit.state = same[0].state
                if between is not None:
                    known[f"{unit.name} between replicas"].state = between.state

    def _take(self, times: float = 1) -> None:
        """Add what has just been noted."""
        for group, collective, role, nbytes in self._noted:
            kind = "parameters" if role.partition(".")[0] == "parameters" else "gradients"
            self.found.sent[kind] += times * nbytes
            self.found.inter[kind] += times * nbytes * leaving(group, collective, self.node_size)
        self._noted.clear()


def leaving(group: dist.ProcessGroup | None, collective: str, node_size: int) -> float:
    """Share of a group's bytes that go to another node: to all others alike, or around a ring in rank order."""
    ranks = dist.get_process_group_ranks(group) if group is not None else range(dist.get_world_size())
    nodes = [rank // node_size for rank in ranks]
    n = len(nodes)
    if n == 1:
        return 0.0
    if collective == "all_to_all":
        counts = Counter(nodes)
        return sum((n - counts[node]) / (n - 1) for node in nodes) / n
    return sum(node != following for node, following in zip(nodes, nodes[1:] + nodes[:1], strict=True)) / n


def _gathered_dtype(engine: Any, model: nn.Module) -> torch.dtype:
    """What parameters are gathered in."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return mixed.get(str(engine.precision_plugin.precision), next(p.dtype for p in model.parameters()))


def _flat_units(
    module: nn.Module, blocks: set[type[nn.Module]], apart: list[nn.Module], engine: Any
) -> Iterator[tuple[Unit, bool]]:
    """Units as FSDP1 lays them out, and whether each is trained; the root first."""
    taken: set[int] = set()
    found = []
    inner = [(name, each) for name, each in module.named_modules() if type(each) in blocks or each in apart]
    for name, each in [*sorted(inner, key=lambda pair: -pair[0].count(".")), ("root", module)]:
        own = [(fqn, p) for fqn, p in each.named_parameters() if id(p) not in taken]
        taken |= {id(p) for _, p in own}
        if own:
            unit = flat_unit(name, [(fqn, tuple(p.shape)) for fqn, p in own], None, engine.traffic)
            found.append((unit, any(p.requires_grad for _, p in own)))
    yield from found[::-1]


def _numbered(name: str) -> str:
    """A name without its numbers: blocks are alike."""
    return re.sub(r"\d+", "#", name)


def _local(value: Tensor) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value
