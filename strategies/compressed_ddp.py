"""DDP through Lightning with compressed gradients: the control, in which every rank holds everything."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies.compressors import Compressor
from strategies.ddp_buckets import KEEP_BUFFERS, FixedBuckets, bucket_units, install_hook
from strategies.engine import CompressedEngine, fitting
from strategies.kernels import Choice
from strategies.traffic import Traffic
from strategies.units import Unit


class CompressedDDP(CompressedEngine, DDPStrategy):
    """Replicated data parallel training with compressed gradients, on CUDA/NCCL and CPU/gloo.

    Parameters, gradients and optimizer states are whole on every rank; nothing is gathered. A unit is one of DDP's
    buckets. Every parameter that is trained must get a gradient in every step.

    Args:
        compressor: How gradients are reduced, e.g. ``Int8``; none leaves torch's own path untouched and uncounted.
        bucket_cap_mb: Size of a bucket in MiB.
        kernels: How codecs compute: "slabs" (no compiler), "compiled", "triton" (on CUDA) or "reference"; "auto" is the
            variable PARE_KERNELS, else slabs on CPU and compiled on CUDA.
        process_group_backend: "gloo" or "nccl"; by default the device's own.
        timeout: How long a rank waits for the others in a collective.

    Raises:
        ValueError: ``bucket_cap_mb`` is less than 1.
    """

    strategy_name = "compressed_ddp"

    def __init__(
        self,
        compressor: Compressor | None = None,
        bucket_cap_mb: int = 25,
        kernels: Choice = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb must be at least 1, got {bucket_cap_mb}")
        wrapping: dict[str, Any] = {"bucket_cap_mb": bucket_cap_mb, **KEEP_BUFFERS}
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **wrapping)
        self.compressor = compressor
        self.bucket_cap_mb = bucket_cap_mb
        self.kernels = kernels
        self.traffic = Traffic()
        self.units: list[Unit] = []

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap ``model``; Lightning registers hooks on CUDA only."""
        if self.compressor is None or self.world_size == 1:
            self._take_up_owed()
            return super()._setup_model(model)
        wrapped = FixedBuckets(model, self.determine_ddp_device_ids(), self.bucket_cap_mb)
        self._take_units(bucket_units(wrapped, self.traffic))
        install_hook(wrapped, self.units, self._reduce_replicated)
        self._warm_up(self.world_size)
        self._take_up_owed()
        return wrapped

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the weights; those of another model are refused by name.

        Raises:
            ValueError: The checkpoint holds other parameters than the model.
        """
        with fitting(self.loaded_from):
            super().load_model_state_dict(checkpoint, strict)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm of the whole (averaged) gradient, on device; call between backward and the optimizer step."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return sum(
            (g.float().pow(2).sum() for g in grads), torch.zeros((), device=self.root_device, dtype=torch.float32)
        ).sqrt()
