"""What decides the quality of a pruned model: every importance with every allocation, two budgets, three seeds.

The seed chooses the calibration text. The short recovery trains low-rank adapters on that text for a few steps; what a
full recovery gains is the experiment `structured_recovery`.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.experiments.runs import BOOKS, json_lines, say
from bench.tables import figures

RECORDS = "ablation.jsonl"
SEEDS, BUDGETS, RECOVERY_STEPS = (1, 2, 3), (0.25, 0.5), 16
Cell = tuple[str, str, float]


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure all cells and append one figure for each, and one for each ordering that is expected.

    A seed that is finished in a `--folder` is not measured again.
    """
    command = f"python -m bench experiment structured_ablation --model {model.name}"
    found: dict[Cell, list[dict[str, Any]]] = {}
    dense = 0.0
    for seed in SEEDS:
        for line in _lines(model, seed, folder):
            if "dense" in line:
                dense = line["dense"]
                continue
            cell = (line["importance"], line["allocation"], line["budget"])
            found.setdefault(cell, []).append(line)
            say(f"seed {seed}, {', '.join(map(str, cell))}: perplexity {line['ppl']:.2f}, {line['ppl_recovered']:.2f}")
    for cell, lines in found.items():
        for field, when in (("ppl", "before"), ("ppl_recovered", f"after {RECOVERY_STEPS} steps of")):
            _cell(records, cell, [line[field] for line in lines], when, dense, command)
    for budget in BUDGETS:
        _orderings(records, {cell: [line["ppl"] for line in lines] for cell, lines in found.items()}, budget, command)


def _lines(model: Path, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The measurements of one seed as they come, or those of before."""
    finished = folder / f"seed-{seed}.jsonl"
    if finished.exists():
        yield from map(json.loads, finished.read_text().splitlines())
        return
    arguments = ["--model", str(model), "--train", str(BOOKS / "train.json"), "--val", str(BOOKS / "valid.json")]
    arguments += ["--seed", str(seed), "--recovery-steps", str(RECOVERY_STEPS), "--budgets", *map(str, BUDGETS)]
    lines = []
    for line in json_lines("lightning_modules.structured_pruning.ablation", *arguments, log=folder / "ablation.log"):
        lines.append(line)
        yield line
    finished.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _cell(records: Path, cell: Cell, ppl: list[float], when: str, dense: float, command: str) -> None:
    importance, allocation, budget = cell
    figures.append(
        records,
        figure=f"ablation-{importance}-{allocation}-{budget}-{when.split()[0]}",
        what=f"`{importance}`, `{allocation}`, {budget:.0%} of the decoder removed, {when} recovery "
        f"(dense {dense:.1f})",
        value=statistics.mean(ppl),
        spread=statistics.stdev(ppl),
        unit="PPL",
        target="report",
        reached=None,
        command=command,
        details={
            "importance": f"`{importance}`",
            "allocation": f"`{allocation}`",
            "budget": f"{budget:.0%}",
            "when": when.split()[0],
            "ppl": ppl,
            "seeds": list(SEEDS),
            "dense_ppl": dense,
        },
    )


def _orderings(records: Path, found: dict[Cell, list[float]], budget: float, command: str) -> None:
    """Whether grouping matters as expected, criterion and budget held fixed, and whether allocation does."""
    ppl = {cell: statistics.mean(values) for cell, values in found.items()}
    aligned, misaligned, truncated = (
        ppl[(name, "Uniform", budget)] for name in ("WeightTaylor", "Misaligned", "PerTensorTruncation")
    )
    best = min(ppl[("GateTaylor", name, budget)] for name in dict.fromkeys(cell[1] for cell in found))
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
