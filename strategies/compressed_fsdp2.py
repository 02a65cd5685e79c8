"""FSDP2 through Lightning, with compressed gradients and compressed parameter gathers, on CUDA/NCCL and CPU/gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.tensor import DTensor

from strategies.compressors import Codec, Compressor, uncompressed
from strategies.engine import CompressedEngine, Start, misfit
from strategies.fsdp2_collectives import (
    CountedAllGather,
    DifferenceAllGather,
    EncodedAllGather,
    UnitReduceScatter,
    count_replica_all_reduce,
)
from strategies.fsdp2_units import ShardedModule, replicated_shards, shard_group, sharded_modules
from strategies.kernels import Choice
from strategies.traffic import Traffic
from strategies.units import Unit, shard_between
from strategies.wrapping import chosen_blocks


class CompressedFSDP2(CompressedEngine, ModelParallelStrategy):
    """Fully sharded data parallel training (``fully_shard``) with compressed gradients and parameter gathers.

    Shards each block that a Hugging Face model declares indivisible, or else each repeated block, and the rest as the
    root, unless ``configure_model`` of the LightningModule has applied ``fully_shard`` itself. Gradients are reduced in
    fp32, under ``bf16-mixed`` too; frozen parameters have none.

    Under manual optimization a training step may run backward and step as often as it likes; after a backward pass the
    root's parameters are there again once an optimizer has stepped.

    Args:
        compressor: How gradients are reduced, e.g. ``Int8``; none leaves torch's own path untouched and uncounted.
        parameter_compressor: How parameter shards travel when they are gathered, e.g. ``Int8``; straight from the fp32
            master weights. Forward and backward (validation too) see the decoded weights, checkpoints the exact ones.
        parameter_differences: Gather codes of how parameters have changed, once a step, instead of parameters: four
            bits do. Costs the whole model in the compute dtype on every rank, and a copy of it in checkpoints.
        sharding_strategy: FULL_SHARD (parameters are gathered for forward and again for backward) or SHARD_GRAD_OP
            (they stay gathered in between). For NO_SHARD use ``CompressedDDP``.
        replicas: Copies of the sharded model (HSDP): ranks are cut into so many groups in rank order, the compressor
            works inside each, and ``replica_compressor`` between them. Usually 1, or the number of nodes.
        replica_compressor: How shards of the gradient are averaged between replicas, e.g. ``Bidirectional`` of
            ``Int8``; none is torch's own all-reduce. With it, gradients are counted and timed inside the groups, too.
        backward_within: Ranks of a node, which keep a copy of the parameters among them after forward, so that backward
            gathers inside the node (ZeRO++'s hpZ). Costs the model in the compute dtype, over the ranks of a node.
        state_dict_type: Checkpoint as one folder with a file per rank ("sharded") or one file ("full").
        auto_wrap_policy: Module classes that are sharded on their own, instead of the blocks that are found.
        start: What each rank has while ``configure_model`` builds the model: its rows of every parameter ("sharded"),
            or all of it ("whole"). The weights are the same. "auto" is sharded for modules that say ``starts_sharded``.
        kernels: How codecs compute: "slabs" (no compiler), "compiled", "triton" (on CUDA) or "reference"; "auto" is the
            variable PARE_KERNELS, else slabs on CPU and compiled on CUDA.
        process_group_backend: "gloo" or "nccl"; by default the device's own.
        timeout: How long a rank waits for the others in a collective.

    Raises:
        ValueError: ``replicas`` is less than 1, or with ``replica_compressor`` less than 2; before any work, if it does
            not divide the ranks. ``parameter_differences`` without a contractive ``parameter_compressor``.
        TypeError: ``parameter_compressor`` is not a codec.
    """

    strategy_name = "compressed_fsdp2"
    reduces_between = True  # replicas reduce gradients between them in every step
    _between: dist.ProcessGroup | None = None  # ranks that hold the same shard

    def __init__(
        self,
        compressor: Compressor | None = None,
        parameter_compressor: Codec | None = None,
        parameter_differences: bool = False,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD",
        replicas: int = 1,
        replica_compressor: Compressor | None = None,
        backward_within: int | None = None,
        state_dict_type: Literal["full", "sharded"] = "sharded",
        auto_wrap_policy: set[type[nn.Module]] | None = None,
        start: Start = "auto",
        kernels: Choice = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if sharding_strategy not in ("FULL_SHARD", "SHARD_GRAD_OP"):
            raise ValueError(
                f"sharding_strategy={sharding_strategy}: FSDP2 knows FULL_SHARD and SHARD_GRAD_OP; add replicas=… for "
                "hybrid sharding, and use CompressedDDP to replicate everything"
            )
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}")
        if replica_compressor is not None:
            if replicas == 1:
                raise ValueError("replica_compressor: there is one replica; say how many with replicas=…")
            compressor = uncompressed() if compressor is None else compressor
        if parameter_compressor is not None and not isinstance(parameter_compressor, Codec):
            raise TypeError(
                f"parameter_compressor must encode and decode (a Codec such as Int8 or BF16); "
                f"{type(parameter_compressor).__name__} only reduces gradients"
            )
        if parameter_differences and (parameter_compressor is None or not parameter_compressor.contractive):
            raise ValueError(
                "parameter_differences: needs a parameter_compressor whose errors shrink, such as Int4 or "
                f"Hadamard(inner=Int4()); got {parameter_compressor!r}"
            )
        super().__init__(
            save_distributed_checkpoint=state_dict_type == "sharded",
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.compressor = compressor
        self.parameter_compressor = parameter_compressor
        once = sharding_strategy != "FULL_SHARD" or parameter_differences
        if backward_within is not None and (backward_within < 2 or once):
            raise ValueError(
                f"backward_within={backward_within}: must be at least 2 ranks, with FULL_SHARD and without "
                "parameter_differences: else backward gathers nothing"
            )
        self.backward_within = backward_within
        self.parameter_differences = parameter_differences
        self._version = 0  # of the weights
        self._differences: list[DifferenceAllGather] = []
        self.sharding_strategy = ShardingStrategy[sharding_strategy]
        self.replicas = replicas
        self.replica_compressor = replica_compressor
        self.block_classes = auto_wrap_policy
        self.start = start
        self.kernels = kernels
        self.traffic = Traffic()
        self.units: list[Unit] = []

    def describe(self) -> dict[str, Any]:
        """See ``CompressedEngine.describe``."""
        codec = self.parameter_compressor
        parameters = {} if codec is None else {"method": codec.name, "config": codec.config()}
        return {
            **super().describe(),
            "sharding_strategy": self.sharding_strategy.name,
            "replicas": self.replicas,
            **({} if self.backward_within is None else {"backward_within": self.backward_within}),
            **({"parameter_differences": True} if self.parameter_differences else {}),
            **{f"parameter_compress_{name}": value for name, value in parameters.items()},
        }

    # Setting up: processes, mesh, sharding.

    def setup_environment(self) -> None:
        """Join the process group; all ranks are data parallel."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """See ``Strategy.model_sharded_context``; ``start`` decides what each rank keeps of the model."""
        shards = self.world_size // self.replicas
        with super().model_sharded_context(), self._building(self.global_rank % max(shards, 1), shards):
            yield

    def setup(self, trainer: Any) -> None:
        """Shard the model where its LightningModule has not, install the collectives, make the optimizers.

        As ``ModelParallelStrategy.setup``, which insists on ``configure_model`` doing the sharding.
        """
        self.accelerator.setup(trainer)
        model: Any = self.model
        self.model = model = self.precision_plugin.convert_module(model)
        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            self._shard(model)
        if self._built is not None:
            self._built.fill_shards(model, self.root_device)
        _materialize_distributed_module(model, self.root_device)
        self.model_to_device()
        self._equalize_replicas(model)
        self._install(model)
        self._warm_up(self.world_size // self.replicas, torch.float32)  # see ``reduce_dtype``
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def check_ranks(self, ranks: int) -> None:
        """See ``CompressedEngine.check_ranks``.

        Raises:
            ValueError: The same, and where one rank is left a group.
        """
        super().check_ranks(ranks)
        shards, within = ranks // self.replicas, self.backward_within
        if within is not None and (shards % within or shards == within):
            raise ValueError(
                f"backward_within={within} must be a divisor of the {shards} ranks that share a model, and less: "
                "usually the ranks of a node"
            )
        if within is not None:
            self.refuse_across_nodes("backward_within", within)
        if self.replicas > 1 and ranks == self.replicas:
            raise ValueError(
                f"replicas={self.replicas} leaves nothing to shard of {ranks} ranks; give a smaller divisor, or use "
                "CompressedDDP to replicate everything"
            )

    def _mesh(self) -> DeviceMesh:
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        self.check_ranks(self.world_size)
        shards = self.world_size // self.replicas
        mesh = init_device_mesh(self.root_device.type, (self.replicas, shards), mesh_dim_names=("replicate", "shard"))
        if self.replica_compressor is None:
            return mesh
        self._between = mesh["replicate"].get_group()
        return mesh["shard"]  # torch knows one replica, and so makes no all-reduce between them

    def _shard(self, model: nn.Module) -> None:
        """Blocks first, then what is left as the root."""
        compute = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        options: dict[str, Any] = {
            "mesh": self._mesh(),
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
            # None: as True, but the root, which backward needs at once, stays gathered
            "reshard_after_forward": None if self.sharding_strategy == ShardingStrategy.FULL_SHARD else False,
        }
        if self.backward_within is not None:
            self.check_ranks(self.world_size)
        inner = options | ({} if self.backward_within is None else {"reshard_after_forward": self.backward_within})
        blocks = chosen_blocks(model, self.block_classes)
        for module in reversed(list(model.modules())):  # children before the modules that hold them
            if type(module) in blocks and module is not model:
                fully_shard(module, **inner)
        fully_shard(model, **options)

    def _equalize_replicas(self, model: nn.Module) -> None:
        """Let all replicas begin with the weights of the first: ranks may have drawn others."""
        with torch.no_grad():
            for replicas, parts in replicated_shards(model):
                group = self._between or replicas
                if group is not None:
                    for part in parts:
                        dist.broadcast(part, dist.get_process_group_ranks(group)[0], group=group)

    def _install(self, model: nn.Module) -> None:
        """Give every FSDP module its own collectives (torch's setters do not recurse)."""
        units: list[Unit] = []
        served = self._differences if self._served is self.lightning_module else []
        before = {gather.kept.name: gather.kept.state for gather in served}
        self._differences = []
        if self.replica_compressor is not None and self._between is None:
            raise ValueError(
                "replica_compressor: the module's configure_model has sharded it already; leave that to it"
            )
        if self.compressor is None and self.parameter_compressor is None:
            return
        for sharded in sharded_modules(model, self.traffic):
            if sharded.gathered.world_size == 1:  # torch calls no collective then
                continue
            sharded.module.set_custom_all_gather(self.gather(sharded))
            if self.compressor is not None and sharded.unit is not None:
                units += self._install_compressor(sharded, sharded.unit)
        self.keepers = [gather.kept for gather in self._differences]
        for unit in self.keepers:
            unit.state = before.get(unit.name, {})
        self._take_units(units)

    def gather(self, sharded: ShardedModule) -> AllGather:
        """What gathers a module's parameters."""
        codec = self.parameter_compressor
        if codec is None:
            return CountedAllGather(sharded)
        if not self.parameter_differences:
            return EncodedAllGather(sharded, codec, self._tell_time)
        self._differences.append(DifferenceAllGather(sharded, codec, self._tell_time, lambda: self._version))
        return self._differences[-1]

    def _weights_changed(self) -> None:
        self._version += 1
        for gather in self._differences:
            gather.changed()

    def _methods(self) -> str:
        """See ``CompressedEngine._methods``."""
        differences = f", differences of parameters {self.parameter_compressor!r}" if self.parameter_differences else ""
        return super()._methods() + differences

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """See ``CompressedEngine.load_checkpoint``."""
        self._version += 1
        for unit in self.keepers:
            unit.state.clear()
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _install_compressor(self, sharded: ShardedModule, unit: Unit) -> list[Unit]:
        """Its gradient's unit, and that of this rank's shard of it between replicas if they are Pare's."""
        module, units, reduce = sharded.module, [unit], self._reduce_sharded
        if self.replica_compressor is not None and self._between is not None:
            unit.level = sharded.gathered.level = "intra"
            if self.reduces_between:
                between = shard_between(unit, unit.numel, self._between)
                units, reduce = [unit, between], partial(self._reduce_shard_between, between)
        module.set_custom_reduce_scatter(UnitReduceScatter(unit, reduce))
        # With a gradient divide factor torch would ask for PREMUL_SUM, whose factor cannot be read; a sum always can.
        module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "set_reduce_scatter_unused_params"):  # new in torch: zeros, so that the layout stays whole
            module.set_reduce_scatter_unused_params(True, recurse=False)
        if sharded.replicas is not None:
            unit.level = sharded.gathered.level = "intra"
            module.set_all_reduce_hook(count_replica_all_reduce(unit, sharded.replicas))
        return units

    def _reduce_shard_between(self, between: Unit, unit: Unit, grad: Tensor, output: Tensor) -> None:
        """``grad [N]`` of this rank → shard ``output [N/n]`` of the mean inside its group, then of all groups."""
        self._reduce_sharded(unit, grad, output)
        self._reduce_between(between, output)

    # Running.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``training_step`` as the root's forward, whose hooks gather the root's parameters."""
        with self.precision_plugin.train_step_context():
            result = self._as_forward("training_step", *args, **kwargs)
        if not self.lightning_module.automatic_optimization:
            self._reshard()  # what the last optimizer step has gathered
        return result

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Strategy.optimizer_step``; inside a training step its next forward pass needs the root's parameters."""
        result = super().optimizer_step(*args, **kwargs)
        self._weights_changed()
        if not self.lightning_module.automatic_optimization and isinstance(self.model, FSDPModule):
            self.model.unshard()
        return result

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``training_step``."""
        with self.precision_plugin.val_step_context():
            return self._as_forward("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``training_step``."""
        with self.precision_plugin.test_step_context():
            return self._as_forward("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``training_step``."""
        with self.precision_plugin.predict_step_context():
            return self._as_forward("predict_step", *args, **kwargs)

    def _as_forward(self, step: str, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        module: Any = self.lightning_module
        return self._forward_redirection(model, module, step, *args, **kwargs)

    def on_validation_end(self) -> None:
        """Free what validation left gathered: without a backward pass nothing else does."""
        self._reshard()

    def on_test_end(self) -> None:
        """See ``on_validation_end``."""
        self._reshard()

    def on_predict_end(self) -> None:
        """See ``on_validation_end``."""
        self._reshard()

    def _reshard(self) -> None:
        for module in self._fsdp_modules():
            module.reshard()

    def _fsdp_modules(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate without reducing: one reduction per optimizer step. Lightning's own does nothing for FSDP2."""
        modules = self._fsdp_modules()
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm of the whole (averaged) gradient, on device; call between backward and the optimizer step."""
        squared = torch.zeros((), device=self.root_device, dtype=torch.float32)
        for parameter in self.model.parameters():
            if isinstance(grad := parameter.grad, DTensor):
                squared += grad.to_local().float().pow(2).sum()
        # not the gradients' mesh: DTensor may give them an equal one of an earlier training, whose groups are gone
        if self.model is not None and (shards := shard_group(self.model)) is not None:
            dist.all_reduce(squared, group=shards)
        return squared.sqrt()

    @property
    def saves_one_file(self) -> bool:
        """See ``CompressedEngine.saves_one_file``."""
        return not self._save_distributed_checkpoint

    def _look_at(self, path: Path, weights_only: bool) -> None:
        """See ``CompressedEngine._look_at``: torch lets rank 0 alone read the tensors, and the others wait for it."""
        if not path.is_file():
            return
        state = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)["state_dict"]
        for name, parameter in self.model.named_parameters():
            saved = tuple(state[name].shape) if name in state else None
            if saved != tuple(parameter.shape):
                raise misfit(path, f"{name} is {tuple(parameter.shape)}, in the checkpoint {saved}")
