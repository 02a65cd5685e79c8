"""FSDP1 through Lightning, with a compressor on every unit's gradient, on CUDA/NCCL and on CPU/gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast
from unittest import mock

import lightning.pytorch.strategies.fsdp as lightning_fsdp
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import CustomPolicy

from strategies import transport
from strategies.compressors import Compressor
from strategies.engine import CompressedEngine, Start
from strategies.kernels import Choice
from strategies.precision import ShardedPrecision
from strategies.traffic import Traffic
from strategies.units import (
    Unit,
    begin_forward,
    count_parameter_gathers,
    end_forward,
    fsdp_units,
    install_hook,
    is_trained,
)
from strategies.wrapping import chosen_blocks, trained_apart

_ROOT = "_fsdp_root"  # where a module keeps what wraps it, out of its submodules' sight: every stage needs it again


class CompressedFSDP(CompressedEngine, FSDPStrategy):
    """Fully sharded data parallel training with compressed gradients.

    Every FSDP unit gets its own communication hook, so that bytes, times and state are kept per unit. By default each
    block that a Hugging Face model declares indivisible, or else each repeated block, is one unit, and the rest
    (embeddings, final norm) the root. Trained modules among frozen parameters, such as adapters, are units as well.

    Under manual optimization a training step may run backward and step as often as it likes; after a backward pass the
    root's parameters are there again once an optimizer has stepped.

    Args:
        compressor: How gradients are reduced, e.g. ``Int8``; none leaves torch's own path untouched and uncounted.
        sharding_strategy: FULL_SHARD (parameters, gradients and optimizer states), SHARD_GRAD_OP (parameters stay
            gathered between forward and backward) or NO_SHARD (everything replicated).
        state_dict_type: Checkpoint as one folder with a file per rank ("sharded") or one file ("full").
        auto_wrap_policy: Module classes (or a policy) that become units, instead of the blocks that are found.
        start: What each rank has while ``configure_model`` builds the model: its rows of every parameter ("sharded";
            a unit is put together when it is wrapped), or all of it ("whole"). The weights are the same. "auto" is
            sharded for modules that say ``starts_sharded``.
        kernels: How codecs compute: "slabs" (no compiler), "compiled", "triton" (on CUDA) or "reference"; "auto" is the
            variable PARE_KERNELS, else slabs on CPU and compiled on CUDA.

    Raises:
        ValueError: For HYBRID_SHARD, under which FSDP1 skips the reduction between nodes when a hook is set.
    """

    strategy_name = "compressed_fsdp"

    def __init__(
        self,
        compressor: Compressor | None = None,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"] = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "sharded",
        auto_wrap_policy: set[type[nn.Module]] | None = None,
        start: Start = "auto",
        kernels: Choice = "auto",
        **kwargs: Any,
    ) -> None:
        if "HYBRID" in str(sharding_strategy):
            raise ValueError(
                f"sharding_strategy={sharding_strategy}: FSDP1 skips the inter-node reduction when a communication "
                "hook is set, so replicas would drift apart. Use FULL_SHARD, SHARD_GRAD_OP or NO_SHARD."
            )
        classes = isinstance(auto_wrap_policy, set | list | tuple | frozenset)
        super().__init__(
            sharding_strategy=sharding_strategy,
            state_dict_type=state_dict_type,
            auto_wrap_policy=None if classes else auto_wrap_policy,
            **kwargs,
        )
        self.compressor = compressor
        self.block_classes = auto_wrap_policy if classes else None
        self.start = start
        self.kernels = kernels
        self.traffic = Traffic()
        self.units: list[Unit] = []

    @property
    def precision_plugin(self) -> Any:
        """The precision in use, always a ``ShardedPrecision`` once the Trainer has set one."""
        return FSDPStrategy.precision_plugin.fget(self)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, ShardedPrecision):
            device = self.parallel_devices[0].type if self.parallel_devices else "cpu"
            plugin = ShardedPrecision(plugin.precision, device)
        FSDPStrategy.precision_plugin.fset(self, plugin)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """See ``Strategy.model_sharded_context``; ``start`` decides what each rank keeps of the model."""
        ranks = 1 if self.sharding_strategy == ShardingStrategy.NO_SHARD else self.world_size
        with super().model_sharded_context(), self._building(self.global_rank, ranks):
            yield

    def _setup_model(self, model: nn.Module) -> FSDP:
        """Wrap ``model``, once: what an earlier stage has wrapped is taken up again."""
        root: FSDP | None = vars(model).get(_ROOT)
        if root is None:
            root = vars(model)[_ROOT] = self._wrap(model)
        elif (root.sharding_strategy, root.mixed_precision) != (self.sharding_strategy, self.mixed_precision_config):
            raise ValueError(
                f"another Trainer has sharded this module, with {root.sharding_strategy.name} and its own precision; "
                "use that Trainer again, or load a checkpoint into a new module"
            )
        lightning_fsdp._move_torchmetrics_to_device(root, self.root_device)
        self.precision_plugin.root = root
        if self.compressor is not None and self.world_size > 1:
            self.check_ranks(self.world_size)
            self._install_compressor(root)
            self._warm_up(dist.get_world_size(root.process_group))
        return root

    def _wrap(self, model: nn.Module) -> FSDP:
        """FSDP1 needs the CPU named as its device, which Lightning does not do."""
        options: dict[str, Any] = {**self.kwargs}
        if any(isinstance(module, FSDP) for module in model.modules()):
            options.pop("auto_wrap_policy", None)  # configure_model has wrapped what it wanted
        elif "auto_wrap_policy" not in options:
            blocks = chosen_blocks(model, self.block_classes)
            apart = trained_apart(model, blocks) if self.compressor is not None else []
            options["auto_wrap_policy"] = CustomPolicy(lambda module: type(module) in blocks or module in apart)
        if self._built is not None and "param_init_fn" not in options:
            options["param_init_fn"] = self._built.fill_whole(self.root_device, None)
        root = FSDP(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **options,
        )
        if self._built is not None:
            self._built.forget()
        for module in FSDP.fsdp_modules(root) if self.world_size > 1 else ():
            # torch's ``sync_module_states`` wants a GPU
            if module.sharding_strategy == ShardingStrategy.NO_SHARD and module._handle is not None:
                first = dist.get_process_group_ranks(module.process_group)[0]
                whole = module._handle.flat_param.data
                moved = whole.to(self.root_device)  # with ``cpu_offload`` it is elsewhere
                dist.broadcast(moved, first, group=module.process_group)
                whole.copy_(moved)
        lightning_fsdp._setup_activation_checkpointing(root, self._activation_checkpointing_kwargs)
        return root

    def _install_compressor(self, root: FSDP) -> None:
        units = []
        for module, unit in fsdp_units(root, self.traffic):
            sharded = module.sharding_strategy != ShardingStrategy.NO_SHARD
            install_hook(module, unit, self._reduce_sharded if sharded else self._reduce_replicated)
            if sharded:
                count_parameter_gathers(module, unit, transport.gather_parameters)
            if is_trained(module):
                units.append(unit)
        self._take_units(units)

    # Manual optimization runs backward inside training_step, which is the root's forward: the forward is ended first.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Strategy.training_step``."""
        module: Any = self.lightning_module
        if module.automatic_optimization:
            return super().training_step(*args, **kwargs)
        root = cast("FSDP", self.model)
        with self.precision_plugin.train_step_context():
            args, kwargs = begin_forward(root, args, kwargs)
            try:
                return module.training_step(*args, **kwargs)
            finally:
                end_forward(root, None)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """See ``Strategy.pre_backward``."""
        super().pre_backward(closure_loss)
        root = cast("FSDP", self.model)
        if not self.lightning_module.automatic_optimization:
            end_forward(root, closure_loss)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Strategy.optimizer_step``."""
        result, root = super().optimizer_step(*args, **kwargs), cast("FSDP", self.model)
        if not self.lightning_module.automatic_optimization:
            begin_forward(root, (), {})
        return result

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole (averaged) gradient, on device; call between backward and the optimizer step."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        squared = sum(
            (g.float().pow(2).sum() for g in grads), torch.zeros((), device=self.root_device, dtype=torch.float32)
        )
        if self.world_size > 1 and self.model.sharding_strategy != ShardingStrategy.NO_SHARD:
            dist.all_reduce(squared)
        return squared.sqrt()

    def describe(self) -> dict[str, Any]:
        """See ``CompressedEngine.describe``."""
        return super().describe() | {"sharding_strategy": self.sharding_strategy.name}

    # Checkpoints, beside what CompressedEngine does.

    @property
    def saves_one_file(self) -> bool:
        """See ``CompressedEngine.saves_one_file``."""
        return self._state_dict_type == "full"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; see ``CompressedEngine.load_checkpoint``."""
        ours = FSDP.optim_state_dict_to_load

        def with_state(*args: Any, optim_state_dict: dict[str, Any], **kwargs: Any) -> Any:
            # a sharded checkpoint drops empty dictionaries, such as the state of SGD without momentum
            kwargs["optim_state_dict"] = {"state": {}, **optim_state_dict}
            return ours(*args, **kwargs)

        with self._full_state_on_device(), mock.patch.object(FSDP, "optim_state_dict_to_load", with_state):
            return super().load_checkpoint(checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model's state, whole or sharded by ``state_dict_type``."""
        with self._full_state_on_device():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Tensor]:
        """The optimizer's state, whole or sharded by ``state_dict_type``."""
        with self._full_state_on_device():
            return super().optimizer_state(optimizer)

    @contextmanager
    def _full_state_on_device(self) -> Iterator[None]:
        """On CPU, gather full states without ``offload_to_cpu``: torch 2.13 frees the tensors it "offloads" from CPU to
        CPU and then reads them (a segmentation fault; pytorch-lightning issue 21804).
        """
        if self.root_device.type != "cpu":
            yield
            return

        def context(module: FSDP, world_size: int, rank0_only: bool = True) -> Any:
            model = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
            optimizer = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False)
            return FSDP.state_dict_type(module, StateDictType.FULL_STATE_DICT, model, optimizer)

        with mock.patch.object(lightning_fsdp, "_get_full_state_dict_context", context):
            yield
