"""Keep what a trained scorer says matters."""

import copy
import hashlib
from typing import Any, Self

from torch import Tensor

from lightning_modules.token_pruning.anatomy import layer_devices
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.scorers.base import Context, Scorer


class Learned(Scorer):
    """A trained token pruner: what its network scores high, such as `MLP` (SDTP, arXiv 2504.04514) or `QueryKey`.

    Each runs where its layer does, and in the model's precision.

    Args:
        pruner: A saved pruner's folder or hub name, or the pruner itself.
    """

    def __init__(self, pruner: str | TokenPruner) -> None:
        self.pruner = pruner
        self._loaded = self._ready = TokenPruner.load(pruner) if isinstance(pruner, str) else pruner

    @property
    def name(self) -> str:
        """See `Variant.name`; the network's."""
        return self._loaded.network.name

    @property
    def pool(self) -> int:  # type: ignore[override]
        """See `Scorer`; the network's."""
        return self._loaded.network.pool

    @property
    def asking(self) -> int:  # type: ignore[override]
        """See `Scorer`; the network's."""
        return self._loaded.network.asking

    def arguments(self) -> dict[str, Any]:
        """See `Variant.arguments`; of a pruner in memory, how it was trained."""
        return {"pruner": self.pruner if isinstance(self.pruner, str) else self._loaded.notes}

    @classmethod
    def examples(cls) -> list[Self]:
        """None: scorers are trained for one model."""
        return []

    def check(self, config: Any, layers: list[int]) -> None:
        """See `Scorer.check`.

        Raises:
            ValueError: Trained for another model, or not for one of these layers.
        """
        self._loaded.check_base(config)
        missing = [layer for layer in layers if layer not in self._loaded.layers]
        if missing:
            raise ValueError(
                f"no trained scorer for layers {missing}; there are scorers for {list(self._loaded.layers)}: "
                "set schedule.layers to these"
            )

    def prepare(self, model: Any, layers: list[int]) -> None:
        """See `Scorer.prepare`.

        Raises:
            ValueError: See `check`; or the weights are others.
        """
        self.check(model.config, layers)
        self._loaded.check_base(model)
        self._ready = copy.deepcopy(self._loaded).to(model.dtype).spread(layer_devices(model)).eval()

    def digest(self) -> str:
        """See `Scorer.digest`."""
        found = hashlib.sha256(repr(self._loaded.network).encode())
        for name, tensor in sorted(self._loaded.state_dict().items()):
            found.update(name.encode() + tensor.cpu().float().numpy().tobytes())
        return found.hexdigest()

    def unbound(self) -> "Learned":
        """A copy that serves any model of the same width: where only shapes matter."""
        pruner = copy.deepcopy(self._loaded)
        pruner.base = None
        return Learned(pruner)

    def flops(self, tokens: int, hidden_size: int) -> float:
        """See `Scorer.flops`; the network's."""
        return self._loaded.network.flops(tokens, hidden_size)

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        return self._ready(hidden_BNH, layer, context.real)
