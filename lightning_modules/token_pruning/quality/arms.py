"""What is compared: the unpruned model, and pruners that differ in scorer, schedule or both."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer


@dataclass(frozen=True)
class Candidate:
    """One way of reading a prompt.

    Attributes:
        scorer: Its name in rows and tables; "unpruned" for the model itself, a folder's name for a pruner from a file.
        keep: What the schedule keeps; None where nothing is dropped.
        schedule: The schedule in words: its arguments that are not the defaults.
        pruner: None reads prompts whole.
    """

    scorer: str
    keep: float | list[float] | None
    schedule: str
    pruner: PromptPruner | None

    def bound(self, cost: Cost, length: int) -> float:
        """Greatest possible speed-up of the prefill of a prompt of `length` tokens."""
        return 1.0 if self.pruner is None else cost.bound(length, self.pruner.schedule, self.pruner.scorer)

    def identity(self) -> list[str]:
        """Equal for arms that drop the same tokens: scorer with arguments and trained weights, and schedule."""
        if self.pruner is None:
            return []
        scorer = self.pruner.scorer
        weights = hashlib.sha256()
        for _, module in sorted((name, value) for name, value in vars(scorer).items() if isinstance(value, nn.Module)):
            for name, tensor in sorted(module.state_dict().items()):
                weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return [repr(scorer), weights.hexdigest(), self.schedule]


UNPRUNED = Candidate("unpruned", None, "", None)


def of_schedules(schedules: Sequence[Schedule], scorers: Sequence[Scorer]) -> list[Candidate]:
    """Every scorer with every schedule."""
    return [
        Candidate(scorer.name, schedule.keep, in_words(schedule), PromptPruner(scorer, schedule))
        for schedule in schedules
        for scorer in scorers
    ]


def of_files(folders: Sequence[str]) -> list[Candidate]:
    """Pruners that `calibrate` wrote, by their folders' names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: See `PromptPruner.from_file`.
    """
    found = [(Path(folder).resolve().name, PromptPruner.from_file(folder)) for folder in folders]
    return [Candidate(name, pruner.schedule.keep, in_words(pruner.schedule), pruner) for name, pruner in found]


def in_words(schedule: Schedule) -> str:
    """The arguments of a schedule that are not the defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(Schedule).parameters.items()}
    values = {name: getattr(schedule, name) for name in defaults}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value != defaults[name]) or "defaults"
