"""What is compared: the unpruned model, pruners that differ in scorer, schedule or both, and peers."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from common.variants import Variant
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers import Peer
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.tasks import Window
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.scorers.oracle import Oracle

FORMAT = 2
"""Of `Candidate.identity`: raise it when equal arguments come to drop other tokens, and all is asked again."""


@dataclass(frozen=True)
class Candidate:
    """One way of reading a prompt.

    Attributes:
        scorer: Its name in rows and tables; "unpruned" for the model itself, a folder's name for a pruner from a file,
            a peer's own.
        keep: Shares that the schedule, or the peer, keeps; None where nothing is dropped, or by numbers of tokens.
        schedule: The schedule in words: its arguments that are not the defaults; of a peer, the peer's.
        pruner: None reads prompts whole.
        tokens: Numbers of tokens that the schedule keeps in place of shares; else None.
        left_out: A sentence that the prompt lacks: "told", the one that tells the answer, or "beside", another.
    """

    scorer: str
    keep: float | list[float] | None
    schedule: str
    pruner: PromptPruner | Peer | None
    tokens: int | list[int] | None = None
    left_out: Literal["told", "beside"] | None = None

    def reads(self, asked: Asked) -> Asked | None:
        """The prompt that is put to it; None where the sentence to leave out is not known."""
        if self.left_out is None:
            return asked
        tokens = asked.told if self.left_out == "told" else asked.beside
        return None if tokens is None else asked.without(tokens)

    def bound(self, cost: Cost, length: int) -> float:
        """Greatest possible speed-up of the prefill of a prompt of `length` tokens."""
        if isinstance(self.pruner, Peer):
            return self.pruner.bound(cost, length)
        return 1.0 if self.pruner is None else cost.bound(length, self.pruner.schedule, self.pruner.scorer)

    @property
    def oracle(self) -> bool:
        """Whether it looks at what comes after the prompt."""
        return isinstance(self.pruner, PromptPruner) and self.pruner.scorer.oracle

    def look(self, model: Any, tokenizer: Any, asked: Asked, answer: str) -> None:
        """Show an oracle the answer that the unpruned model gives; others need no look."""
        if not isinstance(self.pruner, PromptPruner) or not isinstance(self.pruner.scorer, Oracle):
            return
        said = tokenizer(answer, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]  # silence is one, too
        device = model.get_input_embeddings().weight.device
        prompt, response = asked.ids[None].to(device), torch.tensor([said], device=device)
        layers = self.pruner.schedule.resolve(model.config.get_text_config().num_hidden_layers)
        self.pruner.scorer.look(model, Window(prompt, response, response).samples(), layers)

    @cached_property
    def identity(self) -> list[Any]:
        """Equal for arms that drop the same tokens, JSON-able: arguments, what scorers are, and trained weights.

        Weights are read once, so that an arm is of the weights that it had when it was first asked for.
        """
        if self.pruner is None:
            return []
        chooses: Peer | Scorer
        if isinstance(self.pruner, Peer):
            chooses, schedule = self.pruner, _values(self.pruner)
        else:
            chooses, schedule = self.pruner.scorer, _values(self.pruner.schedule)
            schedule["pool"] = self.pruner.schedule.pool or self.pruner.scorer.pool
        scorers = [part for part in _parts(chooses) if isinstance(part, Scorer)]
        trained: list[Any] = [[scorer.asking, scorer.digest()] for scorer in scorers]
        if isinstance(chooses, Peer) and (draft := chooses.digest()):
            trained.append(draft)
        return [FORMAT, repr(chooses), {name: repr(value) for name, value in schedule.items()}, trained]


UNPRUNED = Candidate("unpruned", None, "", None)
GUESSES = Candidate("answer_left_out", None, "", None, left_out="told")
"""The model itself, without the sentence that tells the answer: what it answers rightly all the same, it guesses."""

CHANGES = Candidate("sentence_left_out", None, "", None, left_out="beside")
"""The model itself, without another sentence of that length: what any change of the prompt costs."""


def of_schedules(schedules: Sequence[Schedule], scorers: Sequence[Scorer]) -> list[Candidate]:
    """Every scorer with every schedule."""
    return [_of_schedule(s.name, PromptPruner(s, schedule)) for schedule in schedules for s in scorers]


def of_files(folders: Sequence[str]) -> list[Candidate]:
    """Pruners that `calibrate` wrote, by their folders' names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: See `PromptPruner.from_file`.
    """
    return [_of_schedule(Path(folder).resolve().name, PromptPruner.from_file(folder)) for folder in folders]


def _of_schedule(name: str, pruner: PromptPruner) -> Candidate:
    schedule = pruner.schedule
    keep = schedule.keep if schedule.tokens is None else None  # then it is a default that nobody reads
    return Candidate(name, keep, in_words(schedule), pruner, schedule.tokens)


def of_peers(peers: Sequence[Peer]) -> list[Candidate]:
    """Every peer."""
    return [Candidate(peer.name, peer.keep, in_words(peer), peer) for peer in peers]


def in_words(made: Schedule | Peer) -> str:
    """The arguments of a schedule or peer that are not the defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(made)).parameters.items()}
    values = _values(made)
    return ", ".join(f"{name}={value}" for name, value in values.items() if value != defaults[name]) or "defaults"


def _values(made: Schedule | Peer) -> dict[str, Any]:
    return {name: getattr(made, name) for name in inspect.signature(type(made)).parameters}


def _parts(variant: Variant) -> Iterator[Variant]:
    """A variant and those inside, at any depth."""
    yield variant
    for value in variant.arguments().values():
        if isinstance(value, Variant):
            yield from _parts(value)
