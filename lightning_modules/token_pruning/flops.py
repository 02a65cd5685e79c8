"""How much faster pruned prefill can be at best: floating-point operations with and without.

Matrix products count 2 operations per weight and token; attention is causal, so half its square counts; the output
head runs on the last token only. What is left out (norms, softmax, activations, selecting) is less than a hundredth.
"""

from dataclasses import dataclass
from typing import Any

from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Scorer


@dataclass(frozen=True)
class Cost:
    """What prefill costs in one model.

    Attributes:
        linear: Operations of each layer's matrix products per token, with the experts that it is sent to.
        attention: Operations of each layer's attention per pair of tokens that see each other (query·key and
            weights·values).
        head: Operations of the output head for one token.
        hidden_size: Width of the hidden states.
    """

    linear: tuple[float, ...]
    attention: tuple[float, ...]
    head: float
    hidden_size: int

    @classmethod
    def of(cls, model: Any) -> "Cost":
        """Read a model's costs off its weights' shapes; it may be on the meta device.

        Raises:
            UnsupportedModelError: See `anatomy`.
        """
        parts = anatomy(model)
        linear = [2.0 * parts.active_weights(layer) for layer in range(len(parts.layers))]
        widths = [parts.query_width(layer) for layer in range(len(parts.layers))]
        head = 2.0 * model.get_output_embeddings().weight.numel()
        return cls(tuple(linear), tuple(4.0 * width for width in widths), head, parts.hidden_size)

    def prefill(self, lengths: list[int]) -> float:
        """Operations of reading one prompt, when layer i works on `lengths[i]` tokens."""
        layers = zip(self.linear, self.attention, lengths, strict=True)
        return self.head + sum(linear * n + attention * n * n / 2 for linear, attention, n in layers)

    def bound(self, length: int, schedule: Schedule, scorer: Scorer | None = None) -> float:
        """Greatest possible speed-up of the prefill of one prompt, the scorer's own operations included."""
        lengths = schedule.lengths(length, len(self.linear))
        scored = [lengths[layer] for layer in schedule.resolve(len(self.linear))]
        scoring = sum(scorer.flops(n, self.hidden_size) for n in scored) if scorer else 0.0
        return self.prefill([length] * len(lengths)) / (self.prefill(lengths) + scoring)
