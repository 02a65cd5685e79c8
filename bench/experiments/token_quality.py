"""Every token scorer at equal budgets on three tasks: text after a pruned prompt, a passage that comes again, recall.

Collects saliency, trains the scorers, and lets `main.py verify` compare them with the baselines, 500 samples a task.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from bench import figures, record
from bench.experiments.runs import books, run_main, say

CONFIGS = "configs/token_pruning"
COMMAND = "python -m bench experiment token_quality --model FOLDER"
WINDOWS = 500


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure and append the figures, task by task; what is trained already in a `--folder` is not trained again."""
    for rows in chain(_text(folder / "text", model), _recall(folder / "recall")):
        found = {(row["scorer"], row["keep"]): row for row in rows}
        task, whole = rows[0]["task"], found["unpruned", None]
        for row in rows:
            _frontier(records, row)
        for keep in (0.7, 0.5):
            for baseline in ("random", "recency"):
                _against(records, task, keep, found["mlp", keep], found[baseline, keep])
            if task == "suffix":
                _cost(records, keep, found["mlp", keep], whole)
            if task == "response":
                _answers(records, keep, found)


def _text(folder: Path, model: Path) -> Iterator[list[dict[str, Any]]]:
    """Books that the model was not trained on; rows of each task."""
    data = [*books(), "--data.tokenizer", str(model), "--data.block_size", "512", "--data.batch_size", "4"]
    few = ["--data.max_train_blocks", "1000"]
    common = ["--model.base", str(model), *data]
    _step(folder, "predict", "saliency", *common, *few)
    if not (folder / "runs/token_pruner").exists():
        _step(folder, "fit", "train", *common, *few)
    for task in ("suffix", "repeated"):
        yield _rows(folder, "quality", *common, "--model.tasks", f"[{task}]")


def _recall(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Recall, by a model that is trained for it."""
    if not (folder / "runs/recall_model/model").exists():
        _step(folder, "fit", "recall_model")
    _step(folder, "predict", "recall_saliency")
    if not (folder / "runs/recall_pruner").exists():
        _step(folder, "fit", "recall_train")
    yield _rows(folder, "recall_quality")


def _step(folder: Path, command: str, name: str, *arguments: str) -> None:
    took = run_main(folder, command, f"{CONFIGS}/{name}.yaml", *arguments)
    say(f"{name}: {took:.0f} s")


def _rows(folder: Path, name: str, *arguments: str) -> list[dict[str, Any]]:
    """What `verify` leaves in the record."""
    _step(folder, "verify", name, *arguments, "--model.windows", str(WINDOWS))
    records, _ = record.read(folder / "runs/results.jsonl")
    rows: list[dict[str, Any]] = records[-1]["token_quality"]
    return rows


def _frontier(records: Path, row: dict[str, Any]) -> None:
    keep = "whole prompt" if row["keep"] is None else f"keep {row['keep']:g}"
    recall = row["task"] == "response"
    low, high = (row[("accuracy" if recall else "nll_rise") + end] for end in ("_low", "_high"))
    figures.append(
        records,
        figure=f"{row['task']}-{row['scorer']}-{row['keep']}",
        what=f"{'recall' if recall else row['task']}, {keep}, `{row['scorer']}`, {row['samples']} samples: "
        + ("answers right" if recall else "rise of the loss")
        + " (± half the 95 % interval)",
        value=100 * row["accuracy"] if recall else row["nll_rise"],
        spread=(high - low) / 2 * (100 if recall else 1),
        unit="%" if recall else "nats/token",
        target="report",
        reached=None,
        command=COMMAND,
        details={name: value for name, value in row.items() if name != "kept_by_sample"},
    )


def _against(records: Path, task: str, keep: float, learned: dict[str, Any], other: dict[str, Any]) -> None:
    """Where the learned scorer must win; within noise of recency is enough on plain text."""
    tie = task == "suffix" and other["scorer"] == "recency"
    gain = other["nll_rise"] - learned["nll_rise"]
    clear = learned["nll_rise_high"] < other["nll_rise_low"]
    within = learned["nll_rise_low"] <= other["nll_rise_high"]
    figures.append(
        records,
        figure=f"learned-over-{other['scorer']}-{task}-{keep}",
        what=f"{'recall' if task == 'response' else task}, keep {keep:g}: loss that the learned scorer saves over "
        f"`{other['scorer']}`",
        value=gain,
        unit="nats/token",
        target="within the intervals of 0, or better" if tie else "> 0, intervals apart",
        reached=within if tie else clear,
        command=COMMAND,
    )


def _cost(records: Path, keep: float, learned: dict[str, Any], whole: dict[str, Any]) -> None:
    share = 100 * learned["nll_rise"] / whole["nll"]
    figures.append(
        records,
        figure=f"learned-cost-suffix-{keep}",
        what=f"suffix, keep {keep:g}: loss of the learned scorer over the unpruned model's",
        value=share,
        unit="%",
        target="≤ 2 %",
        reached=share <= 2,
        command=COMMAND,
    )


def _answers(records: Path, keep: float, found: dict[tuple[str, float | None], dict[str, Any]]) -> None:
    whole = found["unpruned", None]["accuracy"]
    for scorer, target in (("mlp", "≥ 95 %"), ("random", "≤ 60 %, or the task is too easy")):
        share = 100 * found[scorer, keep]["accuracy"] / whole if whole else 0.0
        figures.append(
            records,
            figure=f"recall-share-{scorer}-{keep}",
            what=f"recall, keep {keep:g}: answers right with `{scorer}`, of those that the unpruned model gets right",
            value=share,
            unit="%",
            target=target,
            reached=share >= 95 if scorer == "mlp" else share <= 60,
            command=COMMAND,
            details={"unpruned_accuracy": whole},
        )
