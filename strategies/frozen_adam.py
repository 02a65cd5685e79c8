"""Adam whose variance no longer moves: the second phase of 1-bit Adam, on the optimizer that the module has made."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FrozenVariance:
    """Steps an AdamW along momenta instead of gradients, and leaves its variance as it is.

    p ← p − lr·(λp + m̂/(√v̂ + ε)), where the momentum m is what stands in ``p.grad``, m̂ = m/(1 − β₁ᵗ), and v̂ is the
    variance of the last step before it was frozen (Tang et al., 1-bit Adam, arXiv 2102.02888; their corrections for the
    first steps are Adam's here, so that nothing jumps). The first moment becomes m; steps are not counted, so that v̂
    stays what it was. A weight that had no gradient until then has no scale to step by, and only decays: codes give it
    a momentum, and a token's embedding its first gradient, that would be divided by ε.

    It stands for the optimizer where one is stepped; whatever else is asked of it, the optimizer answers.

    Args:
        optimizer: An AdamW that has made steps.
        step: Optimizer steps made before this one, t − 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self._optimizer, self._step = optimizer, step

    def __getattr__(self, name: str) -> Any:
        """What the optimizer has."""
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    state = self._optimizer.state.get(parameter)
                    if parameter.grad is not None and state:
                        self._move(parameter, parameter.grad, group, state)
        self._optimizer._opt_called = True  # else schedulers warn of a step left out
        return loss

    def _move(self, parameter: Tensor, along: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        beta1, beta2 = group["betas"]
        momentum = state["exp_avg"].copy_(along)
        corrected = 1 - beta2 ** float(state["step"])
        spread = (state["exp_avg_sq"] / corrected).sqrt_().add_(group["eps"])
        spread.masked_fill_(state["exp_avg_sq"] == 0, torch.inf)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(momentum, spread, value=-group["lr"] / (1 - beta1 ** (self._step + 1)))


def check_adam(optimizers: Iterable[torch.optim.Optimizer], beta1: float) -> None:
    """Refuse optimizers whose variance cannot be frozen.

    Raises:
        ValueError: One is no AdamW, has another β₁, or an option that changes what its moments are.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decayed = group.get("weight_decay") and not isinstance(optimizer, torch.optim.AdamW)
            if not isinstance(optimizer, torch.optim.Adam) or decayed or group["amsgrad"] or group["maximize"]:
                raise ValueError(
                    f"OneBitAdam freezes the variance of an AdamW without amsgrad and maximize; the module's optimizer "
                    f"is {type(optimizer).__name__}"
                )
            if group["betas"][0] != beta1:
                raise ValueError(
                    f"OneBitAdam(beta1={beta1}) and the optimizer (betas={tuple(group['betas'])}) must have the same "
                    "first decay rate"
                )
