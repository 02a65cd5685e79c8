"""The quality bench as a command: ``python main.py verify``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch

from common.progress import stage
from lightning_modules.loading import Dtype, check_vocabulary, load, load_config
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality.measure import Arm, read, savings, summarise
from lightning_modules.token_pruning.quality.tasks import (
    Window,
    check_repeatable,
    longbench_windows,
    repeated_windows,
    response_windows,
    stack,
    suffix_windows,
)
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.scorers.oracle import Oracle

_FREE = ("random", "recency")  # what costs nothing, and every other scorer must beat
Task = Literal["suffix", "repeated", "response", "longbench"]


class TokenQuality(L.LightningModule):
    """Compares scorers at equal budgets on held-out text, against the unpruned model, sample by sample.

    All arms read the same samples in turn through the real pruned prefill. The result goes into the run record as
    ``token_quality``: a row for every task, scorer and share kept, with what it saves over chance and recency.

    Args:
        base: Hugging Face folder, GGUF file or hub name of the model.
        schedule: Where to prune; its shares are replaced by those of ``keep``.
        scorers: What to compare.
        keep: Shares that every stage keeps.
        tasks: "suffix" (the end of a text), "repeated" (a passage of the prompt comes again), "response" (the data's
            own prompts and responses: recall, instructions), "longbench" (a file).
        windows: Samples of each task.
        suffix: Tokens of the suffix in blocks of plain text.
        longbench: LongBench-style file with ``context``, ``input`` and ``answers``.
        max_prompt: Longest prompt of that file, in tokens.
        dtype: What the model's weights are loaded as; "auto" is what they are on disk.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.

    Raises:
        ValueError: a value outside its range, two scorers of one name, or the task "longbench" without a file.
    """

    def __init__(
        self,
        base: str,
        schedule: Schedule,
        scorers: list[Scorer],
        keep: list[float] = [0.7, 0.5],  # noqa: B006 (jsonargparse shows it)
        tasks: list[Task] = ["suffix", "repeated"],  # noqa: B006
        windows: int = 500,
        suffix: int = 64,
        longbench: str | None = None,
        max_prompt: int = 4096,
        dtype: Dtype = "float32",
        attention: str | None = None,
    ) -> None:
        super().__init__()
        if windows < 1 or suffix < 1 or not scorers or not tasks or not keep:
            raise ValueError("windows and suffix must be at least 1; scorers, tasks and keep must not be empty")
        if not all(0 < share <= 1 for share in keep):
            raise ValueError(f"keep must be within (0, 1], got {keep}")
        names = [scorer.name for scorer in scorers]
        if len(set(names)) < len(names):
            raise ValueError(f"scorers: one of each name, or their rows would be one; got {names}")
        if "longbench" in tasks and longbench is None:
            raise ValueError("the task longbench needs a file: give model.longbench")
        self.base, self.schedule, self.scorers, self.keep = base, schedule, scorers, keep
        self.tasks, self.windows, self.suffix = tasks, windows, suffix
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
            ValueError: A model, schedule or scorer that do not go together, or blocks too short for a task.
        """
        if command != "verify":
            return
        config = load_config(self.base)
        for scorer in self.scorers:
            PromptPruner(scorer, self.schedule).check(config)
        if "longbench" in self.tasks and not self.longbench.is_file():
            raise FileNotFoundError(f"model.longbench: no such file: {self.longbench}")
        if "repeated" in self.tasks:
            check_repeatable(data.block_size, self.suffix)

    def verify(self, datamodule: Any, device: torch.device) -> dict[str, Any]:
        """Run all tasks; returns the record's ``token_quality``."""
        self.model = load(self.base, **self.loading).to(device)
        check_vocabulary(self.model, datamodule.tokenizer)
        rows: list[dict[str, Any]] = []
        for task in self.tasks:
            found = self._task(task, datamodule, device)
            print("\n".join(map(_line, found)), flush=True)  # a task takes long: what is known is shown
            rows += found
        return {"token_quality": rows}

    def _task(self, task: Task, data: Any, device: torch.device) -> list[dict[str, Any]]:
        arms: dict[tuple[str, float | None], Arm] = {("unpruned", None): Arm()}
        pruners: dict[tuple[str, float | None], PromptPruner | None] = {("unpruned", None): None}
        for keep in self.keep:
            schedule = self.schedule.keeping(keep)
            for scorer in self.scorers:
                arms[scorer.name, keep], pruners[scorer.name, keep] = Arm(), PromptPruner(scorer, schedule)
        oracles = [scorer for scorer in self.scorers if isinstance(scorer, Oracle)]
        layers = self.schedule.resolve(self.model.config.num_hidden_layers)
        done = 0
        with stage(f"Task {task}", self.windows, "samples") as show:
            for window in self._batches(task, data):
                placed = Window(*(part.to(device) for part in window))
                for oracle in oracles:  # once for all shares
                    oracle.look(self.model, placed.samples(), layers)
                for name, pruner in pruners.items():
                    read(self.model, placed, pruner, arms[name])
                done += len(window.prompt)
                show(done)
        if not done:
            raise ValueError(f"the task {task} found no sample in {data.name}")
        rows = []
        for (which, share), arm in arms.items():
            over = {free: savings(arm, arms[free, share]) for free in _FREE if free != which and (free, share) in arms}
            row = summarise(task, which, share, arm, arms["unpruned", None])
            rows.append(row | {"oracle": which in {oracle.name for oracle in oracles}, "saved_over": over})
        return rows

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
            yield from longbench_windows(self.longbench, data.tokenizer, self.max_prompt)
            return
        for batch in data.val_dataloader():
            if task == "response":
                yield from stack(list(response_windows(batch, self.suffix)))
            elif task == "suffix":
                yield suffix_windows(batch["input_ids"], self.suffix)
            else:
                yield repeated_windows(batch["input_ids"], self.suffix)


def _line(row: dict[str, Any]) -> str:
    keep = "whole" if row["keep"] is None else f"keep {row['keep']:g}"
    rise = f"{row['nll_rise']:+.4f} [{row['nll_rise_low']:+.4f}, {row['nll_rise_high']:+.4f}] nats"
    what = f"{row['task']:10s} {row['scorer']:14s} {keep:9s}"
    return f"{what} {rise}  accuracy {row['accuracy']:.3f}  kept {row['kept']:.2f}"
