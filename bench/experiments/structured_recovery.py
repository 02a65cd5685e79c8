"""What recovery gives back: perplexity before and after low-rank adapters, at two budgets, over three seeds.

The seed chooses calibration text, order of training text, and the adapters' first values. Training text is the dense
model's own; evaluation text is a book that neither has seen.
"""

import statistics
from pathlib import Path
from typing import Any

from bench.experiments.runs import books, fit, say
from bench.tables import figures

RECORDS = "structured.jsonl"
PRUNE, RECOVER = (f"configs/structured_pruning/{name}.yaml" for name in ("prune", "recover"))
TARGETS, SEEDS = {0.25: 1.1, 0.5: 1.3}, (1, 2, 3)
STEPS = 150


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure both budgets and append two figures for each."""
    for budget in TARGETS:
        found = [recover(folder / f"{budget}-{seed}", folder / "cache", model, seed, budget) for seed in SEEDS]
        before, after = ([one[name] for one in found] for name in ("before", "after"))
        dense = found[0]["dense"]
        say(f"{budget:.0%}: {statistics.mean(before):.2f} × dense, recovered {statistics.mean(after):.2f} ×")
        for when, ratios in (("before", before), ("after", after)):
            target = TARGETS[budget] if when == "after" else None
            figures.append(
                records,
                figure=f"recovery-{when}-{budget}",
                what=f"perplexity {when} recovery, {budget:.0%} of the decoder removed, over the dense model's "
                f"({dense:.1f} = 1.00 ×)",
                value=statistics.mean(ratios),
                spread=figures.spread(ratios),
                unit="×",
                target="report" if target is None else f"≤ {target} ×",
                reached=None if target is None else statistics.mean(ratios) <= target,
                command=f"python -m bench experiment structured_recovery --model {model.name}",
                details={"seeds": list(SEEDS), "steps": STEPS, "ratios": ratios, "dense_ppl": dense},
            )


def recover(folder: Path, cache: Path, model: Path, seed: int, budget: float) -> dict[str, Any]:
    """Prune and recover once; the dense perplexity, and those before and after recovery as multiples of it."""
    text = [*books(), "--data.tokenizer", str(model), "--seed_everything", str(seed)]
    pruning = ["--model.base", str(model), "--model.budget", str(budget), "--model.cache_dir", str(cache)]
    structure = fit(folder, PRUNE, *text, *pruning, command="prune").record["structure"]
    length = ["--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(STEPS)]
    recovered = fit(folder, RECOVER, *text, "--model.teacher", str(model), *length).record
    dense = structure["ppl_before"]
    return {"dense": dense, "before": structure["ppl_after"] / dense, "after": recovered["val_ppl"] / dense}
