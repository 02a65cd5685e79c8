"""Tasks as a command: ``python main.py evaluate``."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from common.files import write_text
from common.locks import lock
from common.randomness import run_seed
from common.records.machine import version
from common.tables import Table
from lightning_modules.evaluation.local import LocalTask
from lightning_modules.loading import Dtype, load, load_config, load_tokenizer
from lightning_modules.quantization import Format, check_available, quantize

_DONE = "results.json"


class TaskEvaluation(L.LightningModule):
    """Asks several models the same tasks and puts their answers side by side: dense, pruned, recovered, tier-sparse, ….

    lm-eval (the extra ``eval``) judges; models are loaded the way that all of Pare loads them. What has been answered
    is kept in ``folder``: a run that was killed goes on, and one more model costs its own time only.

    Args:
        models: Hugging Face folder, GGUF file or hub name of each model, by its name in tables. The first is what the
            others are compared with.
        tasks: Tasks or groups of lm-eval by name ("lambada_openai", "squad_completion", …), or task files (.yaml).
        local: Tasks made of files of one's own.
        include: Folders with further task files, known by the names in them.
        folder: Where items of local tasks and results are kept.
        limit: Ask only so many items of each task.
        num_fewshot: Examples before each item; None takes what a task says.
        chat: Put prompts into the tokenizer's chat template.
        batch_size: Prompts computed together.
        run_code: Allow tasks that execute what the model writes.
        dtype: What weights are loaded as; "auto" is what they are on disk, "fast" the same but
            float32 on processors without instructions for 16 bits.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.
        quantization: Weights of the decoder's linear layers in so many bits, by torchao (the extra ``quant``).

    Raises:
        ValueError: A value outside its range, nothing to ask, or two tasks of one name.
    """

    def __init__(
        self,
        models: dict[str, str],
        tasks: list[str] = [],  # noqa: B006 (jsonargparse shows it)
        local: list[LocalTask] = [],  # noqa: B006
        include: list[str] = [],  # noqa: B006
        folder: str = "runs/evaluation",
        limit: int | None = None,
        num_fewshot: int | None = None,
        chat: bool = False,
        batch_size: int = 8,
        run_code: bool = False,
        dtype: Dtype = "float32",
        attention: str | None = None,
        quantization: Format | None = None,
    ) -> None:
        super().__init__()
        if not models:
            raise ValueError("models: give at least one, as NAME: FOLDER")
        if not tasks and not local:
            raise ValueError("tasks, local: nothing to ask; give one task at least")
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        names = [*tasks, *(one.task for one in local)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tasks, local: {twice} is there twice; give one of them another label")
        self.models, self.tasks, self.local = models, tasks, local
        self.include = [Path(one).expanduser() for one in include]
        self.folder = Path(folder).expanduser()
        self.asking: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "chat": chat}
        self.batch_size, self.run_code = batch_size, run_code
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
        self.quantization = quantization

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what cannot be evaluated, before any weight is read.

        Args:
            command: Others than "evaluate" are not looked at.
            data: Not looked at.

        Raises:
            FileNotFoundError: A model, a file or a folder is not there.
            ValueError: An unknown task, or a package that is not installed.
        """
        if command != "evaluate":
            return
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("evaluate needs the package lm-eval: pip install -e '.[eval]'")
        if self.quantization is not None:
            check_available()
        for path in self.models.values():
            load_config(path)
        for task in self.local:
            task.check()
        from lightning_modules.evaluation.harness import find_tasks

        find_tasks(self.tasks, self.include)

    def inputs(self) -> list[Any]:
        """Folders, files and hub names that are read."""
        return [*self.models.values(), *self.include, *(one.file for one in self.local if one.file is not None)]

    def evaluate(self, device: torch.device) -> dict[str, Any]:
        """Ask all models all tasks; fields of the run record.

        Args:
            device: Where to compute.

        Raises:
            FileNotFoundError: See ``check_arguments``; or items that are on the Hub and cannot be had.
            ValueError: See ``check_arguments``; or a task without items.
        """
        self.check_arguments("evaluate", None)
        from lightning_modules.evaluation import harness

        written = {one.task: one.write(self.folder / "tasks")[0] for one in self.local}
        manager = harness.find_tasks(self.tasks, self.include)
        # all of them before any model: what is not there is said now, not in an hour
        asked = {
            name: harness.digest(harness.load_task(manager, str(written.get(name, name)), self.run_code))
            for name in [*self.tasks, *written]
        }
        done = self._done()
        keys = {
            (path, name): self._key(path, name, asked[name], device) for path in self.models.values() for name in asked
        }
        for model_name, path in self.models.items():
            wanted = {name: key for name in asked if (key := keys[path, name]) not in done}
            if not wanted:
                rank_zero_info(f"{model_name}: all tasks were answered before, see {self.folder / _DONE}")
                continue
            model, tokenizer = self._model(path, device)
            for name, key in wanted.items():
                # fresh ones: they carry the answers of the model that they were asked of
                loaded = harness.load_task(manager, str(written.get(name, name)), self.run_code)
                title = f"{model_name}: {name}"
                rows = harness.ask(
                    model, tokenizer, loaded, title, self.batch_size, **self.asking, run_code=self.run_code,
                    seed=run_seed(),
                )  # fmt: skip
                self.folder.mkdir(parents=True, exist_ok=True)
                with lock(self.folder / _DONE, wait=True):  # another run may have answered others meanwhile
                    done = self._done() | done | {key: rows}
                    write_text(self.folder / _DONE, json.dumps(done, indent=1) + "\n")
            del model
        rows = [
            {"model": model_name, **row, "chance": self._chance(row["task"], row["metric"])}
            for model_name, path in self.models.items()
            for name in asked
            for row in done[keys[path, name]]
        ]
        Console().print(table(rows))
        settings = {**self.asking, "quantization": self.quantization, "dtype": self.loading["dtype"]}
        return {"evaluation": rows, "evaluation_settings": settings}

    def _model(self, path: str, device: torch.device) -> tuple[Any, Any]:
        model = load(path, **self.loading)
        if self.quantization is not None:
            quantize(model.to(device), self.quantization)
        return model.to(device), load_tokenizer(path)

    def _done(self) -> dict[str, list[dict[str, Any]]]:
        """Answers of before, by what they depend on."""
        try:
            found: dict[str, list[dict[str, Any]]] = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def _key(self, path: str, task: str, asked: str, device: torch.device) -> str:
        """Everything that a result depends on: the model's files, the task and its items, and how it is asked."""
        folder = Path(path).expanduser()
        files = sorted(folder.glob("*")) if folder.is_dir() else [folder] if folder.is_file() else []
        weights = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files if one.is_file()]
        if not weights:  # a name on the Hub: which of its commits is here
            weights = [[getattr(load_config(path), "_commit_hash", None)]]
        made_by = [device.type, *map(version, ("lm_eval", "torch", "transformers", "torchao"))]
        parts = [path, weights, task, asked, self.asking, self.loading, self.quantization, run_seed(), made_by]
        return json.dumps(parts, sort_keys=True, default=str)

    def _chance(self, task: str, metric: str) -> float | None:
        guessed = metric in ("acc", "acc_norm")
        return next((one.chance for one in self.local if guessed and one.task == task), None)


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for every task and metric, a column for every model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = {row["model"]: row for row in rows if (row["task"], row["metric"]) == (task, metric)}
        one = next(iter(found.values()))
        shown = [_shown(found.get(model)) for model in models]
        lines.append([task, metric, one["items"], *shown, one["chance"] if one["chance"] is not None else ""])
    return Table(["task", "metric", "items", *models, "chance"], lines)


def _shown(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    error = f" ± {row['stderr']:.3f}" if row["stderr"] is not None else ""
    return f"{row['value']:.3f}{error}"
