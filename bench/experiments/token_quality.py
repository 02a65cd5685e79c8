"""Every token scorer at equal budgets on three tasks: text after a pruned prompt, a passage that comes again, recall.

Collects saliency, trains the scorers, and lets `main.py verify` compare them with the baselines, 500 samples a task.
"""

from pathlib import Path
from typing import Any

from bench import figures, record
from bench.experiments.runs import books, run_main, say

CONFIGS = "configs/token_pruning"
COMMAND = "python -m bench experiment token_quality --model FOLDER"
WINDOWS = 500


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure and append the figures."""
    rows = _text(folder / "text", model) + _recall(folder / "recall")
    found = {(row["task"], row["scorer"], row["keep"]): row for row in rows}
    for row in rows:
        _frontier(records, row)
    for keep in (0.7, 0.5):
        for task in ("suffix", "repeated", "response"):
            for baseline in ("random", "recency"):
                learned, other = found[task, "mlp", keep], found[task, baseline, keep]
                _against(records, task, keep, learned, other)
        _cost(records, keep, found["suffix", "mlp", keep], found["suffix", "unpruned", None])
        _answers(records, keep, found)


def _text(folder: Path, model: Path) -> list[dict[str, Any]]:
    """Books that the model was not trained on."""
    data = [*books(), "--data.tokenizer", str(model), "--data.block_size", "512", "--data.batch_size", "4"]
    few = ["--data.max_train_blocks", "1000"]
    steps = [("predict", "saliency", few), ("fit", "train", few), ("verify", "quality", [])]
    return _steps(folder, steps, ["--model.base", str(model), *data], WINDOWS)


def _recall(folder: Path) -> list[dict[str, Any]]:
    names = [("fit", "recall_model"), ("predict", "recall_saliency"), ("fit", "recall_train")]
    steps: list[tuple[str, str, list[str]]] = [(command, name, []) for command, name in names]
    return _steps(folder, [*steps, ("verify", "recall_quality", [])], [], WINDOWS)


def _steps(folder: Path, steps: list[tuple[str, str, list[str]]], common: list[str], windows: int) -> list[dict]:
    """Run commands of `main.py` one after the other in one folder; the rows of the last one's record."""
    for command, name, more in steps:
        last = ["--model.windows", str(windows)] if command == "verify" else []
        took = run_main(folder, command, f"{CONFIGS}/{name}.yaml", *common, *more, *last)
        say(f"{name}: {took:.0f} s")
    records, _ = record.read(folder / "runs/results.jsonl")
    return records[-1]["token_quality"]


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


def _answers(records: Path, keep: float, found: dict[tuple[str, str, float | None], dict[str, Any]]) -> None:
    whole = found["response", "unpruned", None]["accuracy"]
    for scorer, target in (("mlp", "≥ 95 %"), ("random", "≤ 60 %, or the task is too easy")):
        share = 100 * found["response", scorer, keep]["accuracy"] / whole if whole else 0.0
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
