"""What is compared: the unpruned model, pruners that differ in scorer, schedule or both, and peers."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from common.variants import Variant
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers import Peer
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer


@dataclass(frozen=True)
class Candidate:
    """One way of reading a prompt.

    Attributes:
        scorer: Its name in rows and tables; "unpruned" for the model itself, a folder's name for a pruner from a file,
            a peer's own.
        keep: What the schedule, or the peer, keeps; None where nothing is dropped.
        schedule: The schedule in words: its arguments that are not the defaults; of a peer, the peer's.
        pruner: None reads prompts whole.
    """

    scorer: str
    keep: float | list[float] | None
    schedule: str
    pruner: PromptPruner | Peer | None

    def bound(self, cost: Cost, length: int) -> float:
        """Greatest possible speed-up of the prefill of a prompt of `length` tokens."""
        if isinstance(self.pruner, Peer):
            return self.pruner.bound(cost, length)
        return 1.0 if self.pruner is None else cost.bound(length, self.pruner.schedule, self.pruner.scorer)

    @property
    def oracle(self) -> bool:
        """Whether it looks at what comes after the prompt."""
        return isinstance(self.pruner, PromptPruner) and self.pruner.scorer.oracle

    def identity(self) -> list[str]:
        """Equal for arms that drop the same tokens: scorer with arguments and trained weights, and schedule."""
        if self.pruner is None:
            return []
        chooses = self.pruner if isinstance(self.pruner, Peer) else self.pruner.scorer
        weights = hashlib.sha256()
        for part in (chooses, *(value for value in chooses.arguments().values() if isinstance(value, Variant))):
            found = [(name, value) for name, value in vars(part).items() if isinstance(value, nn.Module)]
            for _, module in sorted(found, key=lambda one: one[0]):
                for name, tensor in sorted(module.state_dict().items()):
                    weights.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return [repr(chooses), weights.hexdigest(), self.schedule]


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


def of_peers(peers: Sequence[Peer]) -> list[Candidate]:
    """Every peer."""
    return [Candidate(peer.name, peer.keep, in_words(peer), peer) for peer in peers]


def in_words(made: Schedule | Peer) -> str:
    """The arguments of a schedule or peer that are not the defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(made)).parameters.items()}
    values = {name: getattr(made, name) for name in defaults}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value != defaults[name]) or "defaults"
