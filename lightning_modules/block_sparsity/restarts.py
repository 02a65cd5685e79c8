"""A learning rate that starts again with every iteration: each is fine-tuned as if it were a run of its own."""

from functools import lru_cache
from typing import Any

import torch
from transformers import get_scheduler


class Restarts:
    """Share of the peak learning rate at an optimizer step; for ``LambdaLR``, whose state has what changes of it.

    Args:
        schedule: A schedule of ``transformers.get_scheduler`` that is a function of the step.
        warmup: Steps of linear warm-up after every start.
        steps: Length of what comes before ``start`` is called.

    Attributes:
        first: Step at which the present schedule began.
        steps: Its length.
        factor: What it is multiplied by.

    Raises:
        ValueError: The schedule is no function of the step alone.
    """

    __slots__ = ("__dict__", "schedule", "warmup")  # arguments of a run: LambdaLR keeps and restores ``__dict__`` alone

    def __init__(self, schedule: str, warmup: int, steps: int) -> None:
        self.schedule, self.warmup = schedule, warmup
        self.first, self.steps, self.factor = 0, steps, 1.0
        _curve(schedule, warmup, steps)

    def start(self, step: int, steps: int, factor: float) -> None:
        """Begin again at a step, for so many steps, with the peak multiplied by a factor."""
        self.first, self.steps, self.factor = step, steps, factor

    def __call__(self, step: int) -> float:
        """What to multiply the peak by."""
        return self.factor * float(_curve(self.schedule, self.warmup, self.steps)(step - self.first))


@lru_cache(maxsize=8)
def _curve(schedule: str, warmup: int, steps: int) -> Any:
    """The function of ``transformers.get_scheduler``."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    if not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(f"lr_schedule {schedule} cannot start again with every iteration: give cosine or linear")
    return scheduler.lr_lambdas[0]
