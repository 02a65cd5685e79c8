"""DDP through Lightning with compressed gradients: the control, in which every rank holds everything."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from strategies.compressors import Compressor, uncompressed
from strategies.ddp_buckets import KEEP_BUFFERS, FixedBuckets, bucket_units, install_hook
from strategies.engine import CompressedEngine, fitting
from strategies.kernels import Choice
from strategies.traffic import Traffic
from strategies.units import Unit, shard_between


class CompressedDDP(CompressedEngine, DDPStrategy):
    """Replicated data parallel training with compressed gradients, on CUDA/NCCL and CPU/gloo.

    Parameters, gradients and optimizer states are whole on every rank; nothing is gathered. A unit is one of DDP's
    buckets. Every parameter that is trained must get a gradient in every step.

    Args:
        compressor: How gradients are reduced, e.g. ``Int8``; none leaves torch's own path untouched and uncounted.
        bucket_cap_mb: Size of a bucket in MiB.
        replicas: Groups of ranks, in rank order, usually the number of nodes: ``compressor`` reduces inside each, then
            each rank its shard with those of the other groups by ``replica_compressor``. 1 is one ring over all.
        replica_compressor: How shards are averaged between groups, e.g. ``Bidirectional`` of ``Int8``; none is fp32.
        overlap: Go on with the backward pass while a bucket is encoded and sent, in a stream or thread of its own.
        kernels: How codecs compute: "slabs" (no compiler), "compiled", "triton" (on CUDA) or "reference"; "auto" is the
            variable PARE_KERNELS, else slabs on CPU and compiled on CUDA.
        process_group_backend: "gloo" or "nccl"; by default the device's own.
        timeout: How long a rank waits for the others in a collective.

    Raises:
        ValueError: ``bucket_cap_mb`` or ``replicas`` is less than 1, or ``replicas`` with ``replica_compressor`` less
            than 2; before any work, if it does not divide the ranks.
    """

    strategy_name = "compressed_ddp"

    def __init__(
        self,
        compressor: Compressor | None = None,
        bucket_cap_mb: int = 25,
        replicas: int = 1,
        replica_compressor: Compressor | None = None,
        overlap: bool = True,
        kernels: Choice = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb must be at least 1, got {bucket_cap_mb}")
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}")
        if replica_compressor is not None and replicas == 1:
            raise ValueError("replica_compressor: there is one group of ranks; say how many with replicas=…")
        if replicas > 1:  # both levels are Pare's
            compressor = uncompressed() if compressor is None else compressor
            replica_compressor = uncompressed() if replica_compressor is None else replica_compressor
        wrapping: dict[str, Any] = {"bucket_cap_mb": bucket_cap_mb, **KEEP_BUFFERS}
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **wrapping)
        self.compressor = compressor
        self.bucket_cap_mb = bucket_cap_mb
        self.replicas, self.replica_compressor = replicas, replica_compressor
        self.overlap = overlap
        self.kernels = kernels
        self.traffic = Traffic()
        self.units: list[Unit] = []

    def describe(self) -> dict[str, Any]:
        """See ``CompressedEngine.describe``."""
        return {**super().describe(), **({"overlaps": True} if self.overlap and self.world_size > 1 else {})}

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap ``model``; Lightning registers hooks on CUDA only."""
        if self.compressor is None or self.world_size == 1:
            self._take_up_owed()
            return super()._setup_model(model)
        self.check_ranks(self.world_size)
        wrapped = FixedBuckets(model, self.determine_ddp_device_ids(), self.bucket_cap_mb)
        if self.replicas == 1:
            units = bucket_units(wrapped, self.traffic)
            self._take_units(units)
            install_hook(wrapped, units, self._reduce_replicated, self.overlap)
        else:
            self._install_two_levels(wrapped)
        self._warm_up(self.world_size // self.replicas)
        self._take_up_owed()
        return wrapped

    def _install_two_levels(self, wrapped: FixedBuckets) -> None:
        inside, outside = self._groups()
        reduce = self._on_two_levels(bucket_units(wrapped, self.traffic, inside), outside)
        install_hook(wrapped, [unit for unit in self.units if unit.level == "intra"], reduce, self.overlap)

    def _groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """This rank's replica, and the ranks that stand where it stands in the other replicas."""
        shape = self.replicas, self.world_size // self.replicas
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        return mesh["shard"].get_group(), mesh["replicate"].get_group()

    def _on_two_levels(self, inside: list[Unit], replicas: dist.ProcessGroup) -> Callable[[Unit, Tensor], None]:
        """Take units of buckets inside a replica, and their shards between replicas; the reduction of a bucket."""
        between = {}
        for unit in inside:
            unit.level = "intra"
            padded = -(-unit.numel // unit.world_size) * unit.world_size
            between[unit.name] = shard_between(unit, padded, replicas)
        self._take_units([*inside, *between.values()])
        return lambda unit, grad: self._reduce_on_two_levels(unit, between[unit.name], grad)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the weights; those of another model are refused by name.

        Raises:
            ValueError: The checkpoint holds other parameters than the model.
        """
        with fitting(self.loaded_from):
            super().load_model_state_dict(checkpoint, strict)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """See ``Strategy.backward``; what went wrong in the thread that reduces is raised as what it is."""
        try:
            return super().backward(*args, **kwargs)
        except RuntimeError:
            failure = self.model.failure if isinstance(self.model, FixedBuckets) else None
            if failure is None:
                raise
            raise failure from None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm of the whole (averaged) gradient, on device; call between backward and the optimizer step."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return sum(
            (g.float().pow(2).sum() for g in grads), torch.zeros((), device=self.root_device, dtype=torch.float32)
        ).sqrt()
