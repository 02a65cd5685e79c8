"""FSDP1 through Lightning, with a compressor on every unit's gradient, on CUDA/NCCL and on CPU/gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
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

from strategies.compressors import Compressor
from strategies.engine import CompressedEngine
from strategies.kernels import Choice
from strategies.precision import ShardedPrecision
from strategies.traffic import Traffic
from strategies.units import Unit, count_parameter_gathers, fsdp_units, install_hook, transformer_blocks


class CompressedFSDP(CompressedEngine, FSDPStrategy):
    """Fully sharded data parallel training with compressed gradients.

    Every FSDP unit gets its own communication hook, so that bytes, times and state are kept per unit. By default each
    block that a Hugging Face model declares indivisible is one unit, and the rest (embeddings, final norm) the root.

    Args:
        compressor: How gradients are reduced, e.g. ``Int8``; none leaves torch's own path untouched and uncounted.
        sharding_strategy: FULL_SHARD (parameters, gradients and optimizer states), SHARD_GRAD_OP (parameters stay
            gathered between forward and backward) or NO_SHARD (everything replicated).
        state_dict_type: Checkpoint as one folder with a file per rank ("sharded") or one file ("full").
        auto_wrap_policy: Module classes (or a policy) that become units, instead of the model's own blocks.
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
        kernels: Choice = "auto",
        **kwargs: Any,
    ) -> None:
        if "HYBRID" in str(sharding_strategy):
            raise ValueError(
                f"sharding_strategy={sharding_strategy}: FSDP1 skips the inter-node reduction when a communication "
                "hook is set, so replicas would drift apart. Use FULL_SHARD, SHARD_GRAD_OP or NO_SHARD."
            )
        super().__init__(
            sharding_strategy=sharding_strategy,
            state_dict_type=state_dict_type,
            auto_wrap_policy=auto_wrap_policy,
            **kwargs,
        )
        self.compressor = compressor
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

    def _setup_model(self, model: nn.Module) -> FSDP:
        """Wrap ``model``; FSDP1 needs the CPU named as its device, which Lightning does not do."""
        if "auto_wrap_policy" not in self.kwargs and (blocks := transformer_blocks(model)):
            self.kwargs |= lightning_fsdp._auto_wrap_policy_kwargs(blocks, {})
        root = FSDP(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        lightning_fsdp._move_torchmetrics_to_device(root, self.root_device)
        lightning_fsdp._setup_activation_checkpointing(root, self._activation_checkpointing_kwargs)
        self.precision_plugin.root = root
        if self.compressor is not None and self.world_size > 1:
            self._install_compressor(root)
            self._warm_up(self.units[0].world_size)
        return root

    def _install_compressor(self, root: FSDP) -> None:
        self.units = []
        for module, unit in fsdp_units(root, self.traffic):
            sharded = module.sharding_strategy != ShardingStrategy.NO_SHARD
            install_hook(module, unit, self._reduce_sharded if sharded else self._reduce_replicated)
            if sharded:
                count_parameter_gathers(module, unit)
            self.units.append(unit)

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole (averaged) gradient, on device; call between backward and the optimizer step."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        squared = sum((g.float().pow(2).sum() for g in grads), torch.zeros((), device=self.root_device))
        if self.world_size > 1 and self.model.sharding_strategy != ShardingStrategy.NO_SHARD:
            dist.all_reduce(squared)
        return squared.sqrt()

    # Checkpoints, beside what CompressedEngine does.

    @property
    def saves_one_file(self) -> bool:
        """See ``CompressedEngine.saves_one_file``."""
        return self._state_dict_type == "full"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; see ``CompressedEngine.load_checkpoint``."""
        with self._full_state_on_device():
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
