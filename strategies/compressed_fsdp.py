"""FSDP1 through Lightning, with a compressor on every unit's gradient, on CUDA/NCCL and on CPU/gloo."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import lightning.pytorch.strategies.fsdp as lightning_fsdp
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from strategies import residuals, transport
from strategies.checkpoints import replace_when_complete
from strategies.compressors import Compressor
from strategies.precision import ShardedPrecision
from strategies.traffic import Traffic
from strategies.units import Unit, count_parameter_gathers, fsdp_units, install_hook, transformer_blocks


class CompressedFSDP(FSDPStrategy):
    """Fully sharded data parallel training with compressed gradients.

    Every FSDP unit gets its own communication hook, so that bytes, times and state are kept per unit. By default each
    block that a Hugging Face model declares indivisible is one unit, and the rest (embeddings, final norm) the root.

    Args:
        compressor: How gradients are reduced, e.g. ``Int8``; none leaves torch's own path untouched and uncounted.
        sharding_strategy: FULL_SHARD (parameters, gradients and optimizer states), SHARD_GRAD_OP (parameters stay
            gathered between forward and backward) or NO_SHARD (everything replicated).
        state_dict_type: Checkpoint as one folder with a file per rank ("sharded") or one file ("full").
        auto_wrap_policy: Module classes (or a policy) that become units, instead of the model's own blocks.

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
        return root

    def _install_compressor(self, root: FSDP) -> None:
        self.units = []
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        for module, unit in fsdp_units(root, self.traffic):
            unit.seed = seed
            sharded = module.sharding_strategy != ShardingStrategy.NO_SHARD
            install_hook(module, unit, self._reduce_sharded if sharded else self._reduce_replicated)
            if sharded:
                count_parameter_gathers(module, unit)
            self.units.append(unit)

    def _reduce_sharded(self, unit: Unit, grad: Tensor, output: Tensor) -> None:
        """FSDP1's hook for FULL_SHARD and SHARD_GRAD_OP: ``grad [N]`` of this rank → mean shard ``output [N/n]``."""
        ideal = transport.ring_bytes(4 * grad.numel(), unit.world_size)
        factor = transport.reduce_scatter_factor(unit.group) * grad.element_size() / 4
        self.traffic.baseline(unit.name, ideal, factor * ideal)
        unit.step = self.lightning_module.trainer.global_step
        self.compressor.reduce_scatter(grad, output, unit)

    def _reduce_replicated(self, unit: Unit, grad: Tensor) -> None:
        """FSDP1's hook for NO_SHARD: ``grad [N]`` becomes the mean in place."""
        ideal = 2 * transport.ring_bytes(4 * grad.numel(), unit.world_size)
        self.traffic.baseline(unit.name, ideal, ideal * grad.element_size() / 4)
        unit.step = self.lightning_module.trainer.global_step
        self.compressor.all_reduce(grad, unit)

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole (averaged) gradient, on device; call between backward and the optimizer step."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        squared = sum((g.float().pow(2).sum() for g in grads), torch.zeros((), device=self.root_device))
        if self.world_size > 1 and self.model.sharding_strategy != ShardingStrategy.NO_SHARD:
            dist.all_reduce(squared)
        return squared.sqrt()

    # Checkpoints. Written beside and renamed, so that a kill while saving leaves the previous one whole.

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint folder or file that appears under ``filepath`` only when it is complete."""
        with replace_when_complete(Path(self.broadcast(filepath)), self.barrier, self.global_rank) as beside:
            owed = residuals.collect(self.units, repr(self.compressor)) if self._has_state() else None
            if owed is not None and self._state_dict_type == "full":
                ranks = [None] * self.world_size if self.global_rank == 0 else None
                dist.gather_object(owed, ranks)
                checkpoint["compressor"] = ranks
            super().save_checkpoint(checkpoint, beside, storage_options)
            if owed is not None and self._state_dict_type == "sharded":
                torch.save(owed, residuals.rank_file(beside, self.global_rank))

    def _has_state(self) -> bool:
        return any(unit.state for unit in self.units)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; one that does not fit this model is refused by name.

        Raises:
            FileNotFoundError: No such checkpoint.
            ValueError: The checkpoint holds other parameters than the model, or another compressor's residuals.
        """
        if not Path(checkpoint_path).exists():
            raise FileNotFoundError(f"no checkpoint at {checkpoint_path}; see the run's checkpoints folder")
        try:
            with self._full_state_on_device():
                # a checkpoint is data: unless told otherwise, refuse one that carries code
                loaded = super().load_checkpoint(checkpoint_path, True if weights_only is None else weights_only)
        except (RuntimeError, KeyError, dist.checkpoint.api.CheckpointException) as error:
            raise ValueError(
                f"checkpoint {checkpoint_path} does not fit this model ({_first_line(error)}). Resume with the config "
                "that the run saved beside its logs, or start without --ckpt_path."
            ) from error
        folder, ranks = Path(checkpoint_path), loaded.pop("compressor", [])
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            ranks = residuals.saved_ranks(folder) if folder.is_dir() else ranks
            if ranks and not self.units:
                rank_zero_warn("nothing is compressed here: the residuals in the checkpoint are dropped")
            elif ranks:
                residuals.restore(ranks, self.units, repr(self.compressor), self.root_device)
        return loaded

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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
