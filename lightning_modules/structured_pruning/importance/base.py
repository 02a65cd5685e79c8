"""What an importance is.

Shape legend: B sequences, T tokens, G groups, C channels, n_rep query heads a group, D head width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.variants import Variant
from lightning_modules.structured_pruning.memory import Workload


class LayerScores(NamedTuple):
    """Importances of one layer's parts, float32 on the CPU; higher is kept.

    Attributes:
        groups: ``[G]``.
        channels: ``[C]``.
    """

    groups: Tensor
    channels: Tensor


class Keep(NamedTuple):
    """How many parts of one layer are kept."""

    groups: int
    channels: int


class Importance(Variant, ABC):
    """Scores every group and channel of a model on calibration text.

    Attributes:
        control: A deliberately wrong variant, for comparison only.
        rescores: Whether ``rescore`` looks at text again.
        shows_progress: Whether ``score`` does so itself, because it is more than one pass over the batches.
        passes: What scoring costs, in forward passes over the text, a backward pass being about two; for estimates.
    """

    control: bool = False
    rescores: bool = False
    shows_progress: bool = False
    passes: float = 3.0

    @abstractmethod
    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """Score all layers in one pass over the batches; the model is as before when this returns.

        Args:
            model: A supported causal language model, in evaluation mode.
            batches: See ``batches.Batch``; run the model through ``batches.logits``, or ``evaluation.backward``.

        Returns:
            One entry a layer.
        """

    def rescore(
        self, model: Any, batches: Sequence[dict[str, Tensor]], scores: list[LayerScores], keep: list[Keep]
    ) -> list[LayerScores]:
        """Scores once it is known how many parts each layer keeps; asked for where a method ``rescores``."""
        return scores

    def memory(self, work: Workload) -> int:
        """Most bytes that ``score`` holds at once besides the model; by default one pass forward and backward."""
        return work.backward(gates=True)

    def query_heads(self, groups: list[int], n_rep: int) -> list[int] | None:
        """Kept query heads where they are not those of the kept groups; None (they are) for every sound method."""
        return None


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())


@contextmanager
def gradients_of(model: Any, wanted: set[int]) -> Iterator[None]:
    """Within the block only the parameters with these ids require gradients; afterwards all is as before."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


def checked(scores: list[LayerScores]) -> list[LayerScores]:
    """The scores, unless they cannot rank anything.

    Raises:
        ValueError: A layer's scores are not finite, or all zero: no gradient reached it, or the text is too short.
    """
    for i, layer in enumerate(scores):
        for name, part in layer._asdict().items():
            if not torch.isfinite(part).all():
                raise ValueError(f"layer {i}: importances of {name} are not finite; use float32, or other text")
            if not part.any():
                raise ValueError(
                    f"layer {i}: importances of {name} are all zero: no gradient reached them; give more calibration "
                    "text (calibration_blocks) with tokens to predict"
                )
    return scores
