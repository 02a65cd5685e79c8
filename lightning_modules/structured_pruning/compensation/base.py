"""What a compensation is.

Shape legend: B sequences, T tokens, K kept inputs of a matrix, H its outputs.
"""

import functools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.variants import Variant
from lightning_modules.structured_pruning.learning import Learned, Row
from lightning_modules.structured_pruning.memory import DOUBLE
from lightning_modules.structured_pruning.moments import Matrix, Moments


@dataclass(frozen=True)
class Fit:
    """What became of one matrix.

    Attributes:
        matrix: The refitted one; None where leaving it as it is was better on text that was held out.
        setting: What it was fitted with, such as the damping; None where there is no such choice, or no refit.
        left: Error of the matrix as sliced, as a share of Σ ‖y‖².
        refitted: Error of refitted ones on held-out text, as a share of Σ ‖y‖²; ``left`` where none was better.
    """

    matrix: Matrix | None
    setting: float | None
    left: float
    refitted: float


class Compensation(Variant, ABC):
    """Says what the kept columns of ``o_proj`` and ``down_proj`` should be, so that a sliced layer gives what it gave.

    Every candidate is judged by cross-validation on calibration blocks that it was not fitted to; where none beats the
    matrix as it is, that stays.

    Args:
        folds: Parts of the calibration blocks, each of which is held out once.
        bias: Add an output bias to ``o_proj`` and ``down_proj`` where the model has none. Only Llama's class knows one.
        follow: Lead to the hidden states of the dense model; otherwise to what the whole layer makes of the sliced
            model's. A layer then makes up for those before it, too.
        relative: Tokens count by 1 / mean square of the hidden state that a layer should lead to: what the next norm
            makes of an error. Otherwise all alike, so that the few tokens of massive activations decide.

    Raises:
        ValueError: Fewer than 2 folds.
    """

    refits = True
    """Whether there is anything to do."""
    learns = False
    """Whether a layer's MLP learns afterwards, see ``learn``."""

    def __init__(self, folds: int = 4, bias: bool = False, follow: bool = False, relative: bool = False) -> None:
        if folds < 2:
            raise ValueError(f"compensation: folds must be at least 2, got {folds}")
        self.folds, self.bias = folds, bias
        self.follow, self.relative = follow, relative

    def weights(self, hidden_BTH: Tensor) -> Tensor:
        """What each token counts, ``[B, T]``, by the hidden states that a layer should lead to."""
        squares = hidden_BTH.float().square().mean(-1)
        return (
            squares.clamp_min(torch.finfo(squares.dtype).tiny).reciprocal()
            if self.relative
            else squares.new_ones(squares.shape)
        )

    @property
    def settings(self) -> Sequence[float | None]:
        """What to try; a single None where there is nothing to choose."""
        return (None,)

    def fewest_tokens(self, inputs: int, outputs: int) -> int:
        """Tokens without which a matrix of so many inputs and outputs is not determined."""
        return 1

    def memory(self, inputs: int, outputs: int, states: int) -> int:
        """Most bytes that refitting holds at once besides the models.

        Args:
            inputs: Of the widest matrix.
            outputs: Of it.
            states: Bytes of one hidden state for every calibration token.
        """
        # moments of each fold, of all and of the rest, and what solving copies
        moments = (self.folds + 5) * inputs**2 + (self.folds + 8) * inputs * outputs
        # hidden states, those of the dense model, and what a layer should add to them
        return self.refits * ((2 + self.follow) * states + DOUBLE * moments)

    def quick(self) -> "Compensation":
        """What costs little and says of two shapes which will be better after this one."""
        return self

    @abstractmethod
    def solve(self, matrix: Matrix, moments: Moments, setting: float | None) -> Matrix:
        """The matrix that suits these moments.

        Args:
            matrix: As sliced; its bias is None where it may not have one.
            moments: Of what it is given and what it should give.
            setting: One of ``settings``.
        """

    def learn(self, mlp: Any, rows: Sequence[Row]) -> Learned:
        """Change all matrices of a layer's MLP, in place; asked for where a compensation ``learns``."""
        raise NotImplementedError

    def fit(self, matrix: Matrix, folds: Sequence[Moments]) -> Fit:
        """Choose a setting by cross-validation, and fit to all text.

        Args:
            matrix: As sliced.
            folds: Moments of each fold, at least two.
        """
        total = functools.reduce(operator.add, folds)
        whole = float(total.yy) or 1.0
        left = total.error(matrix)
        found: list[tuple[float, float | None]] = []
        for setting in self.settings:
            fitted = (self.solve(matrix, total - held_out, setting) for held_out in folds)
            error = sum(held_out.error(one) for held_out, one in zip(folds, fitted, strict=True))
            found.append((error if math.isfinite(error) else math.inf, setting))
        error, setting = min(found, key=lambda pair: pair[0])
        chosen = self.solve(matrix, total, setting)
        if not (error < left and math.isfinite(total.error(chosen))):
            return Fit(None, None, left / whole, left / whole)
        return Fit(chosen, setting, left / whole, error / whole)
