"""lm-eval, EleutherAI's evaluation harness: finding its tasks, and asking a model that Pare has loaded.

Its own rules hold: prompts, metrics, standard errors. Only loading and progress are Pare's. Imported where tasks are
asked, and nowhere else: lm-eval is no part of Pare's base installation.
"""

import contextlib
import difflib
import functools
import hashlib
import inspect
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from common.progress import stage

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that it has not loaded itself
datasets.disable_progress_bars()  # a bar for one file says nothing


def find_tasks(names: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """Index lm-eval's own tasks and those in some folders; none is loaded.

    Args:
        names: Tasks or groups of tasks that must be there, or task files (.yaml).
        include: Folders with task files.

    Raises:
        FileNotFoundError: There is no such folder or task file.
        ValueError: An unknown task; the message names like ones.
    """
    for folder in include:
        if not folder.is_dir():
            raise FileNotFoundError(f"include: no such folder: {folder}")
    manager = _index(tuple(map(str, include)), defaults=False)
    if not all(name in manager.task_index or _is_file(name) for name in names):
        manager = _index(tuple(map(str, include)), defaults=True)
    for name in names:
        if _is_file(name):
            if not Path(name).is_file():
                raise FileNotFoundError(f"tasks: no such task file: {name}")
        elif name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            like = f"; like it: {', '.join(close)}" if close else ""
            raise ValueError(f"tasks: lm-eval has no task or group {name!r}{like}; or give a task file (.yaml)")
    return manager


@functools.cache
def _index(include: tuple[str, ...], defaults: bool) -> TaskManager:
    """Of task files; lm-eval's own are more than ten thousand, and reading them takes a while."""
    return TaskManager(include_path=list(include) or None, include_defaults=defaults)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def load_task(manager: TaskManager, name: str, run_code: bool) -> Any:
    """Load a task, or the tasks of a group, with their items.

    Args:
        manager: See ``find_tasks``.
        name: The task.
        run_code: Whether answers may be executed on this machine, as some tasks do.

    Returns:
        What lm-eval's ``evaluate`` takes.

    Raises:
        FileNotFoundError: Its items are on the Hub, and cannot be had from there.
        ValueError: It has no items, or needs a package that is not there, or executes answers and must not.
    """
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise ValueError(f"tasks: {name} needs another package ({error}); install it, see lm-eval's extras") from error
    except StopIteration as error:  # of datasets, for an empty file
        raise ValueError(f"tasks: {name} has no items to ask") from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"tasks: {name}: {_why(name, error)}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            raise ValueError(
                f"tasks: {name} executes what the model writes: set run_code where that can do no harm (a container "
                "without a network), and HF_ALLOW_CODE_EVAL=1"
            )
        if not len(task.eval_docs):
            raise ValueError(f"tasks: {task.config.task} has no items to ask")
    return loaded


def digest(loaded: Any) -> str:
    """Of what is asked and how: the settings and items of all tasks, so that changed ones are noticed.

    Args:
        loaded: See ``load_task``.
    """
    found = hashlib.sha256()
    for name, task in sorted(loaded["tasks"].items()):
        for part in ([name, task.dump_config()], *task.eval_docs):
            found.update(json.dumps(part, sort_keys=True, default=_told).encode())
    return found.hexdigest()


def _told(value: Any) -> str:
    """The same in every process: a function by its source, not by where it lies in memory."""
    if not callable(value):
        return str(value)
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(value)
    return getattr(value, "__qualname__", type(value).__name__)


def _why(name: str, error: BaseException) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not _is_file(name)
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = "fetch it where there is a network (hf download --repo-type dataset NAME), or ask local tasks"
    if offline:
        return f"its items are on the Hub, HF_HUB_OFFLINE is set, and the cache here has them not ({said}); {remedy}"
    return f"its items cannot be had ({said}); {remedy}"


def ask(
    model: Any,
    tokenizer: Any,
    loaded: Any,
    title: str,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    run_code: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Ask a model and judge its answers.

    Args:
        model: A ``PreTrainedModel``, on the device to compute on.
        tokenizer: Its tokenizer.
        loaded: See ``load_task``.
        title: What progress is shown as.
        batch_size: Prompts computed together.
        limit: Ask only so many items of each task.
        num_fewshot: Examples before each item; None takes what the task says.
        chat: Put prompts into the tokenizer's chat template.
        run_code: See ``load_task``.
        seed: Of the examples.

    Returns:
        A row for every task and metric: ``task``, ``metric``, ``value``, ``stderr`` (None where lm-eval gives none)
        and ``items``.
    """
    answering = _Counted(title, pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own):  # a task that says 0 takes none, as with lm-eval
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it bootstraps
        found = evaluate(
            answering,
            loaded,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=run_code,
            log_samples=False,
            bootstrap_iters=1000,
        )
    assert found is not None  # only other ranks get nothing
    rows = []
    for task, metrics in found["results"].items():
        items = found["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            rows.append(
                {
                    "task": task,
                    "metric": name,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "items": items,
                }
            )
    return rows


class _Counted(HFLM):
    """lm-eval's way of running a model, with Pare's progress in place of its own."""

    def __init__(self, title: str, **arguments: Any) -> None:
        self._title = title
        self._reached: Callable[[int], None] | None = None
        self._count = 0
        super().__init__(**arguments)

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        if self._reached is not None:
            self._count += len(inps)
            self._reached(self._count)
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        if self._reached is not None:
            self._count += len(context)
            self._reached(self._count)
        return super()._model_generate(context, *args, **kwargs)

    def _shown(self, method: Callable[..., Any], requests: Any) -> Any:
        self._count = 0
        with stage(self._title, len(requests), "requests") as self._reached:
            answers = method(requests, disable_tqdm=True)
            self._reached(len(requests))  # continuations of one token share a pass
        self._reached = None
        return answers

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """See ``HFLM.loglikelihood``."""
        return self._shown(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """See ``HFLM.loglikelihood_rolling``."""
        return self._shown(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """See ``HFLM.generate_until``."""
        return self._shown(super().generate_until, requests)
