"""What decides the quality of a pruned model: every importance with three allocations, two budgets, three seeds.

The seed chooses the calibration text. Perplexities are those of the pruned model before any recovery.
"""

import itertools
import statistics
from pathlib import Path
from typing import Any

from bench import figures
from bench.experiments.runs import BOOKS, books, fit, say

CONFIG = "configs/structured_pruning/prune.yaml"
VAL_BLOCKS = 48
IMPORTANCES = (
    *("GateTaylor", "WeightTaylor", "SequentialTaylor", "Activation", "Magnitude", "Random"),
    *("Misaligned", "PerTensorTruncation"),
)
ALLOCATIONS, BUDGETS, SEEDS = ("Uniform", "Inverse", "Global"), (0.25, 0.5), (1, 2, 3)
Cell = tuple[str, str, float]


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure all cells and append one figure for each, and one for each ordering that is expected."""
    command = f"python -m bench experiment structured_ablation --model {model.name}"
    found: dict[Cell, list[float]] = {}
    dense = 0.0
    for allocation, budget, importance in itertools.product(ALLOCATIONS, BUDGETS, IMPORTANCES):
        cell = (importance, allocation, budget)
        for seed in SEEDS:
            structure = prune(folder, model, seed, importance, allocation, budget)
            dense = structure["ppl_before"]
            found.setdefault(cell, []).append(structure["ppl_after"])
        say(f"{importance}, {allocation}, {budget:.0%}: perplexity {statistics.mean(found[cell]):.2f}")
        figures.append(
            records,
            figure=f"ablation-{importance}-{allocation}-{budget}",
            what=f"`{importance}`, `{allocation}`, {budget:.0%} of the decoder removed, before recovery "
            f"(dense {dense:.1f})",
            value=statistics.mean(found[cell]),
            spread=statistics.stdev(found[cell]),
            unit="PPL",
            target="report",
            reached=None,
            command=command,
            details={
                "importance": f"`{importance}`",
                "allocation": f"`{allocation}`",
                "budget": f"{budget:.0%}",
                "ppl": found[cell],
                "seeds": list(SEEDS),
                "dense_ppl": dense,
            },
        )
    for budget in BUDGETS:
        _orderings(records, found, budget, command)


def prune(folder: Path, model: Path, seed: int, importance: str, allocation: str, budget: float) -> dict[str, Any]:
    """Prune once; the record's block. Scores and damages are shared by all runs through the cache."""
    arguments = [
        *books(),
        *("--data.tokenizer", str(model), "--model.base", str(model), "--seed_everything", str(seed)),
        *("--model.importance", importance, "--model.allocation", allocation, "--model.budget", str(budget)),
        *("--model.cache_dir", str(folder / "cache"), "--data.max_val_blocks", str(VAL_BLOCKS)),
    ]
    if importance == "Random":
        arguments += ["--model.importance.seed", str(seed)]
    structure: dict[str, Any] = fit(folder / "run", CONFIG, *arguments, command="prune").record["structure"]
    return structure


def _orderings(records: Path, found: dict[Cell, list[float]], budget: float, command: str) -> None:
    """Whether grouping matters as expected, criterion and budget held fixed, and whether allocation does."""
    ppl = {cell: statistics.mean(values) for cell, values in found.items()}
    aligned, misaligned, truncated = (
        ppl[(name, "Uniform", budget)] for name in ("WeightTaylor", "Misaligned", "PerTensorTruncation")
    )
    best = min(ppl[("GateTaylor", name, budget)] for name in ALLOCATIONS)
    share = f"{budget:.0%} of the decoder removed"
    comparisons = (
        ("misaligned", "misaligned groups over aligned ones", misaligned / aligned, "above 1 ×", 1.0),
        ("truncated", "per-tensor truncation over misaligned groups", truncated / misaligned, "≥ 10 ×", 10.0),
        ("allocation", "uniform over the best allocation", ppl[("GateTaylor", "Uniform", budget)] / best, "> 1 ×", 1.0),
    )
    for name, what, ratio, target, least in comparisons:
        figures.append(
            records,
            figure=f"ordering-{name}-{budget}",
            what=f"perplexity of {what}, {share}, before recovery",
            value=ratio,
            unit="×",
            target=target,
            reached=ratio >= least if least > 1 else ratio > least,
            command=command,
            details={"corpus": BOOKS.name},
        )
