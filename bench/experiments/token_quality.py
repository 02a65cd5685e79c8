"""Every token scorer at equal budgets on three tasks: text after a pruned prompt, a passage that comes again, recall.

Three models: the one that is given, a small one that is trained to look back, and one that is trained for recall. For
each: collect saliency, train the scorers, and let `main.py verify` compare them with the baselines, 500 samples a task.
"""

from pathlib import Path
from typing import Any

from bench.experiments.runs import BOOKS, claim, corpus, run_main, say
from bench.tables import figures
from common.records import record

RECORDS = "token_quality.jsonl"
CONFIGS = "configs/token_pruning"
FOREIGN = BOOKS.parent / "wikitext2/valid.txt"  # text of another kind than models and scorers are trained on
COMMAND = "python -m bench experiment token_quality --model FOLDER"
ROLES = ("given", "reader", "reader-on-wikitext", "recall")  # what the figures call its models
WINDOWS = 500
Row = dict[str, Any]


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure and append the figures, task by task; what is trained already in a `--folder` is not trained again.

    Raises:
        FileNotFoundError: The text of another kind, or the books, are not beside this checkout.
        ValueError: The folder is one that ``claim`` refuses.
    """
    if not FOREIGN.is_file():
        raise FileNotFoundError(f"no text at {FOREIGN}: give any plain text of another kind than the books there")
    corpus()  # says what is missing
    claim(folder, model, BOOKS / "train.json", BOOKS / "valid.json", FOREIGN, model=model.name)
    _given(records, folder / "given", model)
    _reader(records, folder / "reader")
    _append(records, "recall", _recall(folder / "recall"))


def _given(records: Path, folder: Path, model: Path) -> None:
    """The model that is given, on text that does not repeat; larger than the others, so fewer samples and steps."""
    base = [*corpus(), "--model.base", str(model), "--data.tokenizer", str(model)]
    base += ["--model.schedule.init_args.layers=[1,3,5]", "--data.max_train_blocks", "1000", "--data.repeats", "0"]
    target = ["--model.target", "FutureAttention"]
    _step(folder, "predict", "saliency", *base, *target, "--model.num_samples", "1000")
    _text(records, folder, base, [*target, "--trainer.max_steps", "400"])


def _reader(records: Path, folder: Path) -> None:
    """The model that looks back, trained first; also on text of another kind."""
    for part in ("start", "model"):
        if not (folder / "runs/reader/model").exists():
            _step(folder, "fit", f"reader_{part}", *corpus())
    base = [*corpus(), "--data.max_train_blocks", "4000", "--data.repeats", "0.5"]
    _step(folder, "predict", "saliency", *base)
    _text(records, folder, base, [])
    _compare(records, folder, "reader-on-wikitext", [*base, "--data.val", str(FOREIGN)])


def _text(records: Path, folder: Path, base: list[str], training: list[str]) -> None:
    """How long training took, and every scorer on a book that the model was not trained on."""
    if not (folder / "runs/token_pruner").exists():
        took = _step(folder, "fit", "train", *base, *training)
        figures.append(
            records,
            figure=f"learned-time-{folder.name}",
            what=f"training the scorers of model `{folder.name}`, start and validation included",
            value=took / 60,
            unit="min",
            target="≤ 10 min",
            reached=took <= 600,
            command=COMMAND,
        )
    _compare(records, folder, folder.name, base)


def _compare(records: Path, folder: Path, name: str, arguments: list[str]) -> None:
    """Every scorer on both tasks."""
    for task in ("suffix", "repeated"):
        _append(records, name, _rows(folder, "quality", *arguments, "--model.tasks", f"[{task}]"))


def _recall(folder: Path) -> list[Row]:
    """Recall, by a model that is trained for it."""
    if not (folder / "runs/recall_model/model").exists():
        _step(folder, "fit", "recall_model")
    _step(folder, "predict", "recall_saliency")
    if not (folder / "runs/recall_pruner").exists():
        _step(folder, "fit", "recall_train")
    return _rows(folder, "recall_quality")


def _step(folder: Path, command: str, name: str, *arguments: str) -> float:
    took = run_main(folder, command, f"{CONFIGS}/{name}.yaml", *arguments)
    say(f"{name}: {took:.0f} s")
    return took


def _rows(folder: Path, name: str, *arguments: str) -> list[Row]:
    """What `verify` leaves in the record."""
    _step(folder, "verify", name, *arguments, "--model.windows", str(WINDOWS))
    records, _ = record.read(folder / "runs/results.jsonl")
    rows: list[Row] = records[-1]["token_quality"]
    return rows


def _append(records: Path, model: str, rows: list[Row]) -> None:
    """A figure for every scorer and share, and one for every target."""
    found = {(row["scorer"], row["keep"]): row for row in rows}
    task = "recall" if model == "recall" else rows[0]["task"]
    whole = found["unpruned", None]
    for row in rows:
        if row["keep"] is not None:
            _frontier(records, model, task, row, whole)
    for keep in dict.fromkeys(row["keep"] for row in rows if row["keep"] is not None):
        name = f"{model}-{task}-{keep:g}"
        what = f"{task}, model `{model}`, keep {keep:g}"
        for baseline in ("random", "recency"):
            tie = task == "suffix" and baseline == "recency"
            _against(records, name, what, baseline, found["mlp", keep], tie)
        if task == "suffix":
            _cost(records, name, what, found["mlp", keep], whole)
        if task == "recall":
            _answers(records, name, what, found["mlp", keep], found["random", keep], whole)


def _frontier(records: Path, model: str, task: str, row: Row, whole: Row) -> None:
    recall = task == "recall"
    low, high = (row[("accuracy" if recall else "nll_rise") + end] for end in ("_low", "_high"))
    keep = f"keep {row['keep']:g}"
    figures.append(
        records,
        figure=f"{model}-{task}-{row['scorer']}-{row['keep']}",
        what=f"{task}, model `{model}`, {keep}, `{row['scorer']}`, {row['samples']} samples: "
        + ("answers right" if recall else f"rise of the loss over {whole['nll']:.3f} nats/token")
        + " (± half the 95 % interval)",
        value=100 * row["accuracy"] if recall else row["nll_rise"],
        spread=(high - low) / 2 * (100 if recall else 1),
        unit="%" if recall else "nats/token",
        target="report",
        reached=None,
        command=COMMAND,
        details={name: value for name, value in row.items() if name != "kept_by_sample"}
        | {"model": model, "task": task, "scorer": f"`{row['scorer']}`", "case": f"{task}, {keep}"},
    )


def _against(records: Path, name: str, what: str, baseline: str, learned: Row, tie: bool) -> None:
    """Where the learned scorer must win, or come within noise: `tie`."""
    gain, low, high = learned["saved_over"][baseline]
    figures.append(
        records,
        figure=f"learned-over-{baseline}-{name}",
        what=f"{what}: loss that the learned scorer saves over `{baseline}`, paired (± half the 95 % interval)",
        value=gain,
        spread=(high - low) / 2,
        unit="nats/token",
        target="interval reaches 0, or above" if tie else "> 0, interval above 0",
        reached=high >= 0 if tie else low > 0,
        command=COMMAND,
    )


def _cost(records: Path, name: str, what: str, learned: Row, whole: Row) -> None:
    share = 100 * learned["nll_rise"] / whole["nll"]
    figures.append(
        records,
        figure=f"learned-cost-{name}",
        what=f"{what}: rise of the loss with the learned scorer, of the unpruned model's",
        value=share,
        unit="%",
        target="≤ 2 %",
        reached=share <= 2,
        command=COMMAND,
    )


def _answers(records: Path, name: str, what: str, learned: Row, chance: Row, whole: Row) -> None:
    """The learned scorer must keep 95 % of the right answers where chance keeps 60 % or less."""
    share, by_chance = (100 * row["accuracy"] / whole["accuracy"] for row in (learned, chance))
    figures.append(
        records,
        figure=f"learned-share-{name}",
        what=f"{what}: right answers of the unpruned model ({100 * whole['accuracy']:.1f} % of all) that the learned "
        f"scorer keeps (chance keeps {by_chance:.1f} %)",
        value=share,
        unit="%",
        target="≥ 95 %, where chance keeps ≤ 60 %" if by_chance <= 60 else "report: chance keeps more than 60 %",
        reached=share >= 95 if by_chance <= 60 else None,
        command=COMMAND,
    )
