"""No NaN or Inf reaches the weights unnoticed."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.measurement import Measurement


class GradientGuard(Measurement):
    """Watches the global gradient norm, after reduction and before clipping; logs it as ``train/grad_norm``.

    A non-finite norm means that some rank's gradient had NaN or Inf (compressors let them through on purpose). All
    ranks see the same norm, so all take the same decision.

    Args:
        nonfinite: "stop" ends training with an error; "skip" drops the step (the optimizer's state is untouched, the
            schedule moves on) and counts it in ``nan_steps``. What error feedback had owed and sent in that step is
            lost with it; what its gradient still owes comes later, where it was finite.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"] = "stop") -> None:
        self.nonfinite = nonfinite
        self.nan_steps = 0
        self.clipped_steps = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure, count, and stop or skip.

        Raises:
            FloatingPointError: Under "stop", when the norm is NaN or Inf.
        """
        norm = _global_norm(trainer, pl_module).item()
        pl_module.log("train/grad_norm", norm, rank_zero_only=True)
        if math.isfinite(norm):
            self.clipped_steps += norm > (trainer.gradient_clip_val or math.inf)
            return
        self.nan_steps += 1
        if trainer.precision == "16-mixed":  # the gradient scaler expects overflows, skips the step and scales down
            return
        if self.nonfinite == "stop":
            raise FloatingPointError(
                f"gradient norm is {norm} at step {trainer.global_step}: lower the learning rate, train in a wider "
                "precision, or set GradientGuard.nonfinite to 'skip' to drop such steps"
            )
        rank_zero_warn(f"step {trainer.global_step}: gradient norm is {norm}, step skipped ({self.nan_steps} so far)")
        optimizer.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient

    def state_dict(self) -> dict[str, int]:
        """Counters, so that a resumed run reports all of its bad steps."""
        return {"nan_steps": self.nan_steps, "clipped_steps": self.clipped_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See ``state_dict``."""
        self.nan_steps, self.clipped_steps = state_dict["nan_steps"], state_dict["clipped_steps"]

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        return self.state_dict()


def _global_norm(trainer: Trainer, pl_module: LightningModule) -> torch.Tensor:
    """Norm of the reduced gradient; a sharding strategy knows how to add up its shards."""
    if hasattr(trainer.strategy, "grad_norm"):
        return trainer.strategy.grad_norm()
    grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
    # norms of half-precision gradients in their own type are coarse, and overflow
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    return torch.nn.utils.get_total_norm(norms)
