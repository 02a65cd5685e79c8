"""Kept columns refitted by damped least squares; then the whole MLP learns the rest."""

from collections.abc import Sequence
from typing import Any

from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.learning import Learned, Row, learn
from lightning_modules.structured_pruning.memory import SINGLE


class Reconstruction(LeastSquares):
    """``LeastSquares``; then ``gate_proj``, ``up_proj`` and ``down_proj`` of a layer learn what is still missing.

    A refit of ``down_proj`` can only mix what kept channels say; gradient steps change what they say. Layer after layer
    on cached states: no loss of the model, no backward pass through it. See ``learning``.

    Args:
        steps: Optimizer steps for a layer.
        learning_rate: Of Adam, at its highest.
        rows: Blocks of text in a step.
        damping: See ``LeastSquares``.
        folds: See ``Compensation``.
        bias: See ``Compensation``.
        follow: See ``Compensation``.
        relative: See ``Compensation``.

    Raises:
        ValueError: A number that is not positive, or what ``LeastSquares`` refuses.
    """

    learns = True

    def __init__(
        self,
        steps: int = 32,
        learning_rate: float = 5e-4,
        rows: int = 4,
        damping: Sequence[float] = (1e-3, 1e-1, 1.0, 10.0),
        folds: int = 4,
        bias: bool = False,
        follow: bool = True,
        relative: bool = True,
    ) -> None:
        super().__init__(damping, folds, bias, follow, relative)
        for name, value in (("steps", steps), ("learning_rate", learning_rate), ("rows", rows)):
            if not value > 0:
                raise ValueError(f"compensation: {name} must be positive, got {value}")
        self.steps, self.learning_rate, self.rows = steps, learning_rate, rows

    def learn(self, mlp: Any, rows: Sequence[Row]) -> Learned:
        """See ``Compensation.learn``."""
        return learn(mlp, rows, self.steps, self.learning_rate, self.rows)

    def memory(self, inputs: int, outputs: int, states: int) -> int:
        """See ``Compensation.memory``: the refit; or what an MLP is given and should give, and Adam's three copies."""
        copies = 6 * SINGLE * 3 * inputs * outputs  # with gradients, and the matrices before and during a step
        return max(super().memory(inputs, outputs, states), (4 + self.follow) * states + copies)
