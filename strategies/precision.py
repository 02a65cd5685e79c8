"""Precision of the engines: compute in 16 bits, reduce in fp32, clip by the global norm."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision as AutocastPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision


class ShardedPrecision(FSDPPrecision):
    """Lightning's FSDP precision with three changes.

    * Gradients are reduced in fp32 under mixed precision. Lightning's default reduces in 16 bits, so that a compressor
      would start from a gradient that has already lost half of its bits.
    * Buffers stay in fp32: rotary frequencies rounded to bfloat16 displace long positions.
    * ``gradient_clip_val`` works: FSDP's root module knows the global norm.

    Args:
        precision: As for ``Trainer(precision=…)``.
        device_type: "cpu" or "cuda", for autocast.
    """

    root: FSDP | None = None

    def __init__(self, precision: Any, device_type: str) -> None:
        super().__init__(precision)
        self.device_type = device_type

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        """The dtypes FSDP is given."""
        param_dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        if param_dtype is None:
            return super().mixed_precision_config
        return MixedPrecision(param_dtype=param_dtype, reduce_dtype=torch.float32, buffer_dtype=torch.float32)

    def forward_context(self) -> AbstractContextManager:
        """Autocast on the device in use; Lightning's always names CUDA."""
        if "mixed" in self.precision:
            dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
            return torch.autocast(self.device_type, dtype=dtype)
        return super().forward_context()

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float | int) -> None:
        """Scale all gradients so that their norm over all ranks is at most ``clip_val``."""
        if self.root is None:
            raise RuntimeError("gradient clipping before the strategy wrapped the model")
        self.root.clip_grad_norm_(clip_val)


class UnscaledPrecision(AutocastPrecision):
    """Lightning's ``bf16-mixed``, which scales nothing, but lets fused optimizers be clipped.

    Lightning refuses the pair because a fused optimizer undoes the scaling of gradients itself; here there is none.

    Args:
        device_type: "cpu" or "cuda", for autocast.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__("bf16-mixed", device_type)

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """See ``Precision.clip_gradients``."""
        Precision.clip_gradients(self, *args, **kwargs)
