"""The steps of the tour: each is a command that a user could give, on what earlier steps left."""

import importlib.util
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.experiments.runs import ROOT

Program = Literal["main", "bench"]
RECORDS = "runs"  # where steps leave their records, and what the report is of
_TORCHAO, _LM_EVAL = "torchao", "lm_eval"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Short name, unique.
        what: What it does, in words.
        program: "main" for `main.py`, "bench" for `python -m bench`.
        arguments: What follows; paths are relative to the folder that it is started in, or absolute.
        seconds: About how long it takes on two free cores: for the time left, before anything was measured.
        needs: Steps whose results it reads.
        obstacle: Why it cannot run on this machine.
        always: It runs again when anything else has run, and whatever has failed.
    """

    name: str
    what: str
    program: Program
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    obstacle: str | None = None
    always: bool = False

    def words(self, here: str) -> list[str]:
        """The command, as it is typed in a folder from which ``here`` leads to the repository."""
        start = ["python", f"{here}/main.py"] if self.program == "main" else ["python", "-m", "bench"]
        return [*start, *self.arguments]

    def command(self, folder: Path) -> str:
        """The command, as it is typed in the repository."""
        inside = f"cd {shlex.quote(os.path.relpath(folder))} && " if folder.resolve() != Path.cwd() else ""
        return inside + shlex.join(self.words(to_repository(folder)))


def to_repository(folder: Path) -> str:
    """The way from a folder to the repository, short."""
    return min(os.path.relpath(ROOT, folder.resolve()), str(ROOT), key=len)


@dataclass(frozen=True)
class Given:
    """A model that the tour is to be made on.

    Attributes:
        name: Folder or file, absolute, or a name on the Hub.
        layers: Of its decoder.
        train: Text to calibrate and to recover on; the documentation on this machine when not given.
        val: Text to measure on.
    """

    name: str
    layers: int
    train: Path | None = None
    val: Path | None = None

    def data(self) -> tuple[str, ...]:
        """Arguments that name the texts and the tokenizer."""
        files = ["--data", "TextCorpus", "--data.train", str(self.train), "--data.val", str(self.val)]
        return (*(files if self.train else ["--data", "EmbeddedDocs"]), "--data.tokenizer", self.name)


def plan(folder: Path, given: Given | None, short: bool) -> list[Step]:
    """The steps in order.

    Args:
        folder: Where they work.
        given: The model; None trains small ones.
        short: Everything once, as small as it can be: whether it works, not what it gives.
    """
    make = _Maker(to_repository(folder), short)
    model = "runs/llama/model" if given is None else given.name
    steps = [_compression(make)]
    data: tuple[str, ...]
    if given is None:
        data = ("--data.tokenizer", model, "--data.sources", "[topics]" if short else "[stdlib, topics]")
        data += ("--data.max_val_blocks", "64")  # one text for all that the table compares
        steps += [_own_model(make), *_recall(make)]
        first: tuple[str, ...] = ("model",)
    else:
        data, first = given.data(), ()
        steps += _calibrated(make, given)
    steps += _structure(make, model, data, first, given)
    steps += _tiers(make, data, given)
    steps += _together(make, model, data, first, given)
    report = ("report", RECORDS, "-o", "report.html")
    return [*steps, Step("report", "one HTML file of all records", "bench", report, 8, always=True)]


class _Maker:
    """Makes steps of `main.py`.

    Args:
        here: The way to the repository.
        short: Whether ``brief`` arguments are added.
    """

    def __init__(self, here: str, short: bool) -> None:
        self.here, self.short = here, short

    def __call__(
        self,
        name: str,
        what: str,
        command: str,
        config: str,
        seconds: float,
        *arguments: str,
        needs: Sequence[str] = (),
        brief: Sequence[str] = (),
        obstacle: str | None = None,
    ) -> Step:
        """A step; a training goes on from its last checkpoint when it was killed."""
        words = [command, "--config", f"{self.here}/configs/{config}.yaml", *arguments]
        words += ["--ckpt_path", "auto"] if command == "fit" else []
        words += brief if self.short else []
        return Step(name, what, "main", tuple(words), 3 if self.short else seconds, tuple(needs), obstacle)


def _missing(package: str, extra: str) -> str | None:
    """Why a step that needs a package cannot run."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"needs the package {package}: pip install -c constraints.txt -e '.[{extra}]'"


def _steps(count: int) -> list[str]:
    """Train for so many steps, and validate at the end of them."""
    return ["--trainer.max_steps", str(count), "--trainer.val_check_interval", str(count)]


# ---- gradient compression, and the models that the tour trains -------------------------------------------------------


def _compression(make: _Maker) -> Step:
    arguments = ["sweep", "--config", f"{make.here}/configs/tour/compression.yaml"]
    arguments += ["--results", f"{RECORDS}/compression.jsonl"]
    if make.short:
        arguments += ["--only", "none,int8", "--", *_steps(8), "--data.sources=[topics]", "--data.max_val_blocks=8"]
        arguments += ["--model.config={n_layer: 2, n_embd: 32, n_head: 2}", "--data.vocab_size=300"]
    what = "train between two hosts on a slow link, plain and with gradients and parameters in codes"
    return Step("compression", what, "bench", tuple(arguments), 30 if make.short else 120)


def _own_model(make: _Maker) -> Step:
    brief = [*_steps(4), "--data.sources", "[topics]", "--data.max_val_blocks", "8", "--model.warmup_steps", "1"]
    brief += ["--data.block_size", "64", "--data.vocab_size", "300", "--model.config.num_hidden_layers", "5"]
    return make("model", "pretrain a small Llama under two FSDP ranks", "fit", "tour/llama", 130, brief=brief)


def _recall(make: _Maker) -> list[Step]:
    """A model that looks up facts, and scorers that learn which tokens it will need."""
    folder, brief = "token_pruning/recall_", ["--data.max_val_blocks", "16"]
    return [
        make(
            "reader", "train a small model that looks up facts in its prompt", "fit", f"{folder}model", 120,
            *READER, brief=[*_steps(4), *brief],
        ),
        make(
            "calibration", "collect which tokens of a prompt its answers need", "predict", f"{folder}saliency", 15,
            needs=["reader"], brief=["--model.num_samples", "64", "--data.max_train_blocks", "64"],
        ),
        make(
            "scorers", "train scorers to guess that", "fit", f"{folder}train", 30,
            needs=["calibration"], brief=[*_steps(4), *brief, "--data.max_train_blocks", "64"],
        ),
        make(
            "answers", "ask for facts after pruned prompts, every scorer alike", "verify", f"{folder}quality", 40,
            needs=["scorers"], brief=["--model.windows", "8", "--data.max_val_blocks", "8"],
        ),
        make(
            "prefill", "time pruned prompts beside whole ones", "validate", f"{folder}prefill", 20,
            needs=["scorers"], brief=["--trainer.callbacks.repeats", "1", "--trainer.callbacks.lengths", "[128]"],
        ),
    ]  # fmt: skip


READER = ("--trainer.max_steps", "1200", "--trainer.val_check_interval", "400")
"""The configuration trains longer; its scorers need no more than this."""


def _calibrated(make: _Maker, given: Given) -> list[Step]:
    """The same on a model that answers questions: its own heads say which tokens it needs."""
    lengths = ["--model.lengths", "[600, 1200]"]
    few = ["--model.lengths", "[200]"]
    return [
        make(
            "calibration", "find the heads that look up planted facts, and a schedule twice as fast", "calibrate",
            "token_pruning/calibrate", 420, "--model.base", given.name, *given.data(), "--model.facts", "40", *lengths,
            brief=["--model.facts", "20", *few],
        ),
        make(
            "prefill", "time pruned prompts beside whole ones", "validate", "token_pruning/calibrated", 150,
            "--model.pretrained", given.name, *given.data(), "--trainer.callbacks.lengths", "[1024, 2048]",
            needs=["calibration"], brief=["--trainer.callbacks.lengths", "[256]", "--trainer.callbacks.repeats", "1"],
        ),
        make(
            "answers", "ask for other planted facts after pruned prompts", "verify", "token_pruning/answers", 240,
            "--model.base", given.name, *given.data(), "--model.pruners", "[runs/calibrated]", "--model.scorers", "[]",
            "--model.peers", "[]", "--model.windows", "40", *lengths, "--model.answers", "answers.jsonl",
            needs=["calibration"], brief=["--model.windows", "4", *few],
        ),
    ]  # fmt: skip


# ---- fewer parameters, fewer weights ---------------------------------------------------------------------------------

_SMALL = ("--data.block_size", "64", "--data.batch_size", "2", "--data.max_val_blocks", "4")  # of the short form


def _structure(make: _Maker, model: str, data: Sequence[str], first: Sequence[str], given: Given | None) -> list[Step]:
    folder, output = "structured_pruning", "runs/structured_pruning/recovered"
    sizes = ("--data.block_size", "512", "--data.batch_size", "2", "--data.max_val_blocks", "24")
    text = (*data, *sizes) if given else tuple(data)
    budget = ("--model.budget", "0.15", "--model.calibration_blocks", "32") if given else ()
    recovery = [*_steps(40), "--trainer.accumulate_grad_batches", "2"] if given else _steps(60)
    timing = ["--trainer.callbacks.batch_sizes", "[1]" if given else "[1, 8]"]
    once = ["--trainer.callbacks.batch_sizes", "[1]", "--trainer.callbacks.prompt_tokens", "32"]
    once += ["--trainer.callbacks.repeats", "1", "--data.val_stride", "32"]
    steps = [
        make(
            "structure", "remove heads and channels; what is left is refitted, and proved", "prune", f"{folder}/prune",
            300 if given else 40, "--model.base", model, *text, *budget, needs=first,
            brief=[*_SMALL, "--model.calibration_blocks", "48", "--model.probe_blocks", "1"],
        ),
        make(
            "recovery", "recover it with adapters, which are merged", "fit", f"{folder}/recover",
            360 if given else 60, "--model.teacher", model, *text, *recovery, needs=[*first, "structure"],
            brief=[*_SMALL, *_steps(2), "--model.warmup_steps", "1"],
        ),
        make(
            "evaluation", "perplexity, prefill and decoding beside the dense model", "validate", f"{folder}/validate",
            120 if given else 25, "--model.base", model, *text, *timing,
            needs=["recovery"], brief=[*_SMALL, *once],
        ),
        make(
            "stock", "write it as a stock class", "export", f"{folder}/prune", 40 if given else 12,
            "--model.base", model, "--model.output", output, *text, needs=["recovery"], brief=_SMALL,
        ),
    ]  # fmt: skip
    return [*steps, *([_tasks(make, model, output, given)] if given else [])]


def _tasks(make: _Maker, model: str, output: str, given: Given) -> Step:
    """Tasks made of the held-out text."""
    obstacle = _missing(_LM_EVAL, "eval") or (None if given.val else "needs a text of yours (--train and --val)")
    local = [{"class_path": name, "init_args": {"file": str(given.val), "items": 100}} for name in _LOCAL]
    return make(
        "tasks", "what it can still do: cloze and next sentences", "evaluate", "evaluation/local", 240,
        "--model.models", f"{{dense: {model}, recovered: {output}}}", "--model.local", str(local),
        needs=["recovery"], obstacle=obstacle,
    )  # fmt: skip


_LOCAL = ("Cloze", "NextSentence")


def _tiers(make: _Maker, data: Sequence[str], given: Given | None) -> list[Step]:
    folder, source = "block_sparsity", "runs/structured_pruning/recovered"
    pruned = "runs/block_sparsity/model"
    sizes = ("--data.block_size", "512", "--data.batch_size", "1", "--data.max_val_blocks", "24")
    text = (*data, *sizes) if given else tuple(data)
    shares = '{"class_path": "LinearSchedule", "init_args": {"iterations": 2, "dense": 0.6, "mid_2_4": 0.4, "topk": 0}}'
    length = "10" if given else "15"
    small = [*_SMALL, "--model.calibration_blocks", "2"]
    return [
        make(
            "tiers", "blocks to 2:4 in two iterations, the rest updated, fine-tuned between", "fit",
            f"{folder}/progressive", 480 if given else 60, "--model.pretrained", source, "--model.output", pruned,
            *text, "--model.schedule", shares, "--trainer.limit_train_batches", length, "--model.warmup_steps", "2",
            "--model.calibration_blocks", "8",
            needs=["recovery"], brief=[*small, "--trainer.limit_train_batches", "2", "--model.warmup_steps", "1"],
        ),
        make(
            "packed", "pack it into the bytes it needs", "export", f"{folder}/export", 30 if given else 12,
            "--model.pretrained", pruned, *text, needs=["tiers"], brief=_SMALL,
        ),
        make(
            "packed-int8", "the same with values in int8", "export", f"{folder}/export", 30 if given else 12,
            "--model.pretrained", pruned, "--model.output", "runs/block_sparsity/packed_int8",
            "--model.export_dtype", "int8", *text, needs=["tiers"], brief=_SMALL,
        ),
        make(
            "proof", "prove that the packed model is the pruned one", "verify", f"{folder}/export",
            40 if given else 12, "--model.pretrained", pruned, *text, needs=["packed"], brief=_SMALL,
        ),
    ]  # fmt: skip


_SCHEDULE = "lightning_modules.token_pruning.schedule.Schedule"


def _together(make: _Maker, model: str, data: Sequence[str], first: Sequence[str], given: Given | None) -> list[Step]:
    sizes = ("--data.block_size", "512", "--data.batch_size", "2", "--data.max_val_blocks", "64")
    lacks = _missing(_TORCHAO, "quant")
    without = f", int8 left out ({lacks})" if lacks else ""
    weights = [] if lacks else ["--trainer.callbacks.weights", "int8"]
    after = given.layers // 2 if given else 2
    arguments = f'{{"layers": [{after}], "keep": 0.25}}'
    weights += ["--trainer.callbacks.schedule", f'{{"class_path": "{_SCHEDULE}", "init_args": {arguments}}}']
    if given:
        weights += ["--trainer.callbacks.windows", "24", "--trainer.callbacks.repeats", "5"]
    brief = ["--trainer.callbacks.repeats", "1", "--trainer.callbacks.windows", "2"]
    brief += ["--trainer.callbacks.prompt_tokens", "128", "--trainer.callbacks.suffix", "16"]
    what = f"all of it on one model: what each step costs and gains{without}"
    return [
        make(
            "together", what, "validate", "evaluation/together",
            240 if given else 40, "--model.pretrained", model, *data, *(sizes if given else ()), *weights,
            needs=[*first, "recovery", "packed", "packed-int8"], brief=[*_SMALL, *brief],
        )
    ]  # fmt: skip
