"""Keep what a gradient of the response's loss says matters."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.scorers.oracle import Oracle
from lightning_modules.token_pruning.targets import Target
from lightning_modules.token_pruning.targets.gate_gradient import GateGradient


class SaliencyOracle(Oracle):
    """The saliency that scorers are trained towards, computed from the response itself.

    Args:
        target: Which saliency; by default the gradient of a gate on the token's key.
    """

    def __init__(self, target: Target | None = None) -> None:
        self.target = target or GateGradient()

    @property
    def name(self) -> str:
        """See `Variant.name`; which saliency, too."""
        return f"oracle_{self.target.name}"

    def measure(self, model: Any, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See `Oracle.measure`."""
        return self.target.values(model, samples, layers)
