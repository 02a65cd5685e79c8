"""The quality bench as a command: ``python main.py verify``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from rich.console import Console

from common.progress import stage
from lightning_modules.loading import Dtype, check_vocabulary, load, load_config
from lightning_modules.token_pruning.peers import Peer
from lightning_modules.token_pruning.quality import asking, longbench
from lightning_modules.token_pruning.quality.arms import CHANGES, GUESSES, UNPRUNED, of_files, of_peers, of_schedules
from lightning_modules.token_pruning.quality.measure import Arm, read, savings, summarise
from lightning_modules.token_pruning.quality.planted import plant
from lightning_modules.token_pruning.quality.questions import find_questions
from lightning_modules.token_pruning.quality.tasks import (
    Window,
    check_repeatable,
    plain_ids,
    repeated_windows,
    response_windows,
    stack,
    suffix_windows,
)
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.scorers.oracle import Oracle

_FREE = ("random", "recency")  # what costs nothing, and every other scorer must beat
_ASKED = ("needles", "questions", "longbench_answers")
_FILED = ("longbench", "longbench_answers")
Task = Literal["suffix", "repeated", "response", "longbench", "needles", "questions", "longbench_answers"]


class TokenQuality(L.LightningModule):
    """Compares scorers at equal budgets on held-out text, against the unpruned model, sample by sample.

    All arms read the same samples in turn through the real pruned prefill. The result goes into the run record as
    ``token_quality``: a row for every task, scorer and schedule. Tasks that read a suffix say what a scorer saves over
    chance and recency; tasks that ask say which right answers stay right, see ``asking.summarise``.

    Args:
        base: Hugging Face folder, GGUF file or hub name of the model.
        schedule: Where to prune; its shares are replaced by those of ``keep``. None is the default schedule.
        scorers: What to compare. In tasks that ask, oracles are shown the unpruned model's own answer.
        keep: Shares that every stage keeps.
        tasks: "suffix" (the end of a text), "repeated" (a passage of the prompt comes again), "response" (the data's
            own prompts and responses: recall, instructions), "longbench" (a file), "needles" (facts planted in the
            validation texts, answered freely), "questions" (what these texts answer themselves, answered freely),
            "longbench_answers" (the questions of that file, answered freely).
        windows: Samples of each task; prompts of tasks that ask.
        suffix: Tokens of the suffix in blocks of plain text.
        longbench: LongBench-style file with ``context``, ``input`` and ``answers``.
        max_prompt: Longest prompt of that file, in tokens.
        dtype: What the model's weights are loaded as; "auto" is what they are on disk, "fast" the same but
            float32 on processors without instructions for 16 bits.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.
        schedules: Whole schedules to compare, in place of ``schedule`` with each of ``keep``.
        pruners: Folders that `calibrate` wrote, compared beside these.
        lengths: Most tokens of a prompt in tasks that ask, in turn.
        prefix: Begin the answers of needles, so that what was planted comes next.
        distractors: Facts of the same kind about others that are planted beside each needle.
        max_new_tokens: Longest free answer, in tokens.
        seed: Of facts, passages and questions.
        answers: File that free answers are appended to as they come; what it holds is not asked again.
        known_only: In tasks that ask, put what the unpruned model answers wrongly to no arm: where it knows little,
            most of the time goes into answers of which nothing can be kept.
        controls: Ask needles and questions of the unpruned model twice more, for scale: without the sentence that tells
            the answer, which says what it guesses, and without another one as long, which says what any change of a
            prompt costs. Answers kept are then also counted of those that were not guessed.
        peers: Published ways to read or to keep less of a prompt, put beside the scorers in tasks that ask. They read
            one prompt at a time and sit out the others.

    Raises:
        ValueError: a value outside its range, two scorers or schedules that are one, or the task "longbench" without
            a file.
    """

    def __init__(
        self,
        base: str,
        schedule: Schedule | None = None,
        scorers: list[Scorer] = [],  # noqa: B006 (jsonargparse shows it)
        keep: list[float] = [0.7, 0.5],  # noqa: B006
        tasks: list[Task] = ["suffix", "repeated"],  # noqa: B006
        windows: int = 500,
        suffix: int = 64,
        longbench: str | None = None,
        max_prompt: int = 4096,
        dtype: Dtype = "float32",
        attention: str | None = None,
        schedules: list[Schedule] | None = None,
        pruners: list[str] = [],  # noqa: B006
        lengths: list[int] = [600, 1200, 2400, 3000],  # noqa: B006
        prefix: bool = False,
        distractors: int = 0,
        max_new_tokens: int = 24,
        seed: int = 0,
        answers: str = "runs/answers.jsonl",
        known_only: bool = False,
        controls: bool = False,
        peers: list[Peer] = [],  # noqa: B006
    ) -> None:
        super().__init__()
        if windows < 1 or suffix < 1 or not (scorers or pruners or peers) or not tasks or not keep:
            raise ValueError(
                "windows and suffix must be at least 1; scorers (or pruners, peers), tasks and keep must not be empty"
            )
        if not all(0 < share <= 1 for share in keep):
            raise ValueError(f"keep must be within (0, 1], got {keep}")
        names = [scorer.name for scorer in scorers]
        if len(set(names)) < len(names):
            raise ValueError(f"scorers: one of each name, or their rows would be one; got {names}")
        if set(_FILED) & set(tasks) and longbench is None:
            raise ValueError(f"tasks {' and '.join(_FILED)} need a file: give model.longbench")
        if max_new_tokens < 1 or not lengths:
            raise ValueError("max_new_tokens must be at least 1, and lengths must not be empty")
        if schedules is None:
            schedules = [(schedule or Schedule()).keeping(share) for share in keep]
        if peers and not set(tasks) & set(_ASKED):
            raise ValueError(f"peers read one prompt at a time: give tasks one of {', '.join(_ASKED)}, got {tasks}")
        self.arms = [UNPRUNED, *of_schedules(schedules, scorers), *of_files(pruners), *of_peers(peers)]
        ways = [(arm.scorer, arm.schedule) for arm in self.arms]
        if len(set(ways)) < len(ways):
            raise ValueError(
                "schedules, keep, pruners, peers: two are one by name and schedule, and their rows would be one; leave "
                "one out, or give a folder another name"
            )
        self.base, self.scorers, self.tasks, self.windows, self.suffix = base, scorers, tasks, windows, suffix
        self.lengths, self.prefix, self.distractors = lengths, prefix, distractors
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.answers, self.known_only, self.controls = Path(answers).expanduser(), known_only, controls
        self.longbench, self.max_prompt = Path(longbench or "").expanduser(), max_prompt
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
        self.model: Any = None

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what `verify` cannot do, before any text or weight is read.

        Args:
            command: Others than "verify" are not looked at.
            data: The DataModule.

        Raises:
            FileNotFoundError: No such base, or no LongBench-style file.
            ValueError: A model, schedule or scorer that do not go together, blocks too short for a task, or prompts
                longer than the model has positions for.
        """
        if command != "verify":
            return
        config = load_config(self.base)
        for arm in self.arms:
            if arm.pruner is not None:
                arm.pruner.check(config)
        for task in self.tasks:
            self._check_positions(task, config, data)
        if {"needles", "questions"} & set(self.tasks) and not hasattr(data, "documents"):
            raise ValueError(
                f"data: {type(data).__name__} has no plain texts to ask about; needles and questions need some, "
                "as TextCorpus and EmbeddedDocs have them"
            )
        if set(_FILED) & set(self.tasks) and not self.longbench.is_file():
            raise FileNotFoundError(f"model.longbench: no such file: {self.longbench}")
        if "repeated" in self.tasks:
            check_repeatable(data.block_size, self.suffix)

    def _check_positions(self, task: Task, config: Any, data: Any) -> None:
        """Refuse what is longer than the model has positions for."""
        room = getattr(config.get_text_config(), "max_position_embeddings", None)
        answer = self.max_new_tokens if task in _ASKED else 1 if task == "longbench" else 0
        if task in _FILED:
            name, most = "max_prompt", self.max_prompt
        else:
            name, most = ("lengths", max(self.lengths)) if task in _ASKED else ("data.block_size", data.block_size)
        if room is not None and most + answer > room:
            said = f" and {answer} of answer" if answer else ""
            raise ValueError(f"{name}: {most} tokens{said} are more than the {room} that the model reads")

    def verify(self, datamodule: Any, device: torch.device) -> dict[str, Any]:
        """Run all tasks; returns the record's ``token_quality``."""
        self.model = load(self.base, **self.loading).to(device)
        check_vocabulary(self.model, datamodule.tokenizer)
        rows: list[dict[str, Any]] = []
        for task in self.tasks:
            # a task takes long: what is known is shown
            if task in _ASKED:
                found = self._ask(task, datamodule)
                Console().print(*asking.tables(found))
            else:
                found = self._task(task, datamodule, device)
                print("\n".join(map(_line, found)), flush=True)
            rows += found
        return {"token_quality": rows}

    def _task(self, task: Task, data: Any, device: torch.device) -> list[dict[str, Any]]:
        pruned = [(arm, arm.pruner) for arm in self.arms if not isinstance(arm.pruner, Peer)]
        found = {(arm.scorer, arm.schedule): Arm() for arm, _ in pruned}
        oracles = [scorer for scorer in self.scorers if isinstance(scorer, Oracle)]
        depth = self.model.config.num_hidden_layers
        layers = sorted({layer for _, pruner in pruned if pruner for layer in pruner.schedule.resolve(depth)})
        done = 0
        with stage(f"Task {task}", self.windows, "samples") as show:
            for window in self._batches(task, data):
                placed = Window(*(part.to(device) for part in window))
                for oracle in oracles:  # once for all shares
                    oracle.look(self.model, placed.samples(), layers)
                for arm, pruner in pruned:
                    read(self.model, placed, pruner, found[arm.scorer, arm.schedule])
                done += len(window.prompt)
                show(done)
        if not done:
            raise ValueError(f"the task {task} found no sample in {data.name}")
        rows = []
        for arm, _ in pruned:
            mine = found[arm.scorer, arm.schedule]
            others = [free for free in _FREE if free != arm.scorer and (free, arm.schedule) in found]
            over = {free: savings(mine, found[free, arm.schedule]) for free in others}
            row = summarise(task, arm.scorer, arm.keep, mine, found[UNPRUNED.scorer, UNPRUNED.schedule])
            row |= {"tokens": arm.tokens, "schedule": arm.schedule, "oracle": arm.oracle, "saved_over": over}
            rows.append(row)
        return rows

    def _ask(self, task: Task, data: Any) -> list[dict[str, Any]]:
        texts = [text for split, text in data.documents() if split == "val"] if task != "longbench_answers" else []
        if task == "longbench_answers":
            prompts = longbench.asked(self.longbench, data.tokenizer, self.max_prompt, self.windows)
        elif task == "needles":
            prompts = plant(
                texts, data.tokenizer, self.lengths, self.windows, self.prefix, self.seed, "test", self.distractors
            )
        else:
            prompts = find_questions(texts, data.tokenizer, self.lengths, self.windows, self.seed)
        arms = list(self.arms)
        if self.controls and task != "longbench_answers":  # whose answers need not stand in one sentence
            arms[1:1] = [GUESSES, CHANGES]
        answers = asking.Answers(self.answers, self.model, self.max_new_tokens)
        return asking.compare(task, self.model, data.tokenizer, prompts, self.lengths, arms, answers, self.known_only)

    def _batches(self, task: Task, data: Any) -> Iterator[Window]:
        """Windows of a task until there are enough."""
        left = self.windows
        for window in self._all(task, data):
            yield Window(*(part[:left] for part in window))
            left -= len(window.prompt)
            if left <= 0:
                return

    def _all(self, task: Task, data: Any) -> Iterator[Window]:
        if task == "longbench":
            yield from longbench.windows(self.longbench, data.tokenizer, self.max_prompt)
            return
        for batch in data.val_dataloader():
            if task == "response":
                yield from stack(list(response_windows(batch, self.suffix)))
            elif task == "suffix":
                yield suffix_windows(plain_ids(batch, "the task suffix"), self.suffix)
            else:
                yield repeated_windows(plain_ids(batch, "the task repeated"), self.suffix)


def _line(row: dict[str, Any]) -> str:
    rise = f"{row['nll_rise']:+.4f} [{row['nll_rise_low']:+.4f}, {row['nll_rise_high']:+.4f}] nats"
    what = f"{row['task']:10s} {row['scorer']:14s} {row['schedule'] or 'whole'}"
    return f"{what}  {rise}  accuracy {row['accuracy']:.3f}  kept {row['kept']:.2f}"
