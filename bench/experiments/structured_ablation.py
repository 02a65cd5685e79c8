"""What decides the quality of a pruned model: every importance with every allocation, two budgets, three seeds.

The seed chooses the calibration text. The short recovery trains low-rank adapters on that text for a few steps; what a
full recovery gains is the experiment `structured_recovery`.

A seed is measured in a process of its own, in which a model is loaded once and parts are scored once for all budgets:

python -m bench.experiments.structured_ablation --model FOLDER --train train.json --val val.json
"""

import argparse
import inspect
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.experiments.runs import BOOKS, claim, json_lines, say
from bench.tables import figures
from common.files import write_text
from common.progress import stage
from common.randomness import run_seed
from common.variants import variants
from lightning_modules.data.cache import cache_root
from lightning_modules.data.text import TextCorpus
from lightning_modules.loading import load
from lightning_modules.perplexity import validation_perplexity
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.budget import channel_multiple, removed_parameters
from lightning_modules.structured_pruning.importance import Importance
from lightning_modules.structured_pruning.layers import family
from lightning_modules.structured_pruning.layout import Layout
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.planner import Planner
from lightning_modules.structured_pruning.rounds import short_recovery
from lightning_modules.structured_pruning.slicing import slice_model

RECORDS = "ablation.jsonl"
SEEDS, BUDGETS, RECOVERY_STEPS = (1, 2, 3), (0.25, 0.5), 16
CALIBRATION_BLOCKS, VALIDATION_BLOCKS, BLOCK = 128, 48, 256
Cell = tuple[str, str, float]


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure all cells and append one figure for each, and one for each ordering that is expected.

    A seed that is finished in a `--folder` is not measured again.
    """
    command = f"python -m bench experiment structured_ablation --model {model.name}"
    commit = claim(folder, model, BOOKS / "train.json", BOOKS / "valid.json")
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
            _cell(records, cell, [line[field] for line in lines], when, dense, command, commit)
    for budget in BUDGETS:
        ppl_of = {cell: [line["ppl"] for line in lines] for cell, lines in found.items()}
        _orderings(records, ppl_of, budget, command, commit)


def _lines(model: Path, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The measurements of one seed as they come, or those of before."""
    finished = folder / f"seed-{seed}.jsonl"
    if finished.exists():
        yield from map(json.loads, finished.read_text().splitlines())
        return
    arguments = ["--model", str(model), "--train", str(BOOKS / "train.json"), "--val", str(BOOKS / "valid.json")]
    arguments += ["--seed", str(seed)]
    lines = []
    for line in json_lines(__name__, *arguments, log=folder / f"seed-{seed}.log"):
        lines.append(line)
        yield line
    write_text(finished, "".join(f"{json.dumps(line)}\n" for line in lines))


def _cell(
    records: Path, cell: Cell, ppl: list[float], when: str, dense: float, command: str, commit: str | None
) -> None:
    importance, allocation, budget = cell
    figures.append(
        records,
        figure=f"ablation-{importance}-{allocation}-{budget}-{when.split()[0]}",
        what=f"`{importance}`, `{allocation}`, {budget:.0%} of the decoder removed, {when} recovery "
        f"(dense {dense:.1f})",
        value=statistics.mean(ppl),
        spread=figures.spread(ppl),
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
            "measured_at": commit,
        },
    )


def _orderings(records: Path, found: dict[Cell, list[float]], budget: float, command: str, commit: str | None) -> None:
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
            details={"corpus": BOOKS.name, "measured_at": commit},
        )


def cells(
    model: Any,
    base: str,
    data: TextCorpus,
    importances: Sequence[Importance],
    allocations: Sequence[Allocation],
    budgets: Sequence[float],
    cache: Path,
) -> Iterator[dict[str, Any]]:
    """Prune a copy of the model in every way.

    Args:
        model: The dense model; not changed.
        base: Its folder or hub name.
        data: Calibration text (training batches) and evaluation text (validation batches), set up.
        importances: What is worth keeping within a layer.
        allocations: How a budget is divided among the layers.
        budgets: Shares of the decoder's parameters to remove.
        cache: Folder for damages and scores.

    Yields:
        The names of a cell, its perplexity ``ppl``, and ``ppl_recovered``, that after a short recovery on the
        calibration text.
    """
    whole = ModelShape.of(model, torch.float32.itemsize)
    multiple = channel_multiple(whole.shapes, None)
    batches = data.calibration(CALIBRATION_BLOCKS, run_seed())
    for importance, allocation in itertools.product(importances, allocations):
        layout = Layout("free", allocation, multiple=multiple)
        planner = Planner(model, base, batches, importance, layout, cache, stage)
        for budget in budgets:
            target = removed_parameters(budget, "decoder", whole.footprint(data.block_size))
            pruned = slice_model(model, planner.plan(target, {}))
            before = validation_perplexity(pruned, data)
            recovered, _ = short_recovery(pruned, batches, RECOVERY_STEPS, learning_rate=1e-3)
            yield {
                "importance": type(importance).__name__,
                "allocation": type(allocation).__name__,
                "budget": budget,
                "ppl": before,
                "ppl_recovered": validation_perplexity(recovered, data),
            }


def seeded(importance: type[Importance], seed: int) -> Importance:
    """An importance with this seed, where it draws anything; else with its defaults."""
    takes_seed = "seed" in inspect.signature(importance).parameters
    return importance(**({"seed": seed} if takes_seed else {}))


def main() -> None:
    """Print a line for the dense model, then one a cell, as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "val"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the choice of calibration text")
    options = parser.parse_args()
    os.environ["PL_GLOBAL_SEED"] = str(options.seed)  # what `run_seed` reads: decides the order of the text
    torch.manual_seed(options.seed)  # the adapters' first values
    model = load(options.model, supported=family)
    data = TextCorpus(
        options.train,
        options.val,
        tokenizer=options.model,
        block_size=BLOCK,
        batch_size=8,
        max_val_blocks=VALIDATION_BLOCKS,
    )
    data.prepare_data()
    data.setup("fit")
    print(json.dumps({"dense": validation_perplexity(model, data), "seed": options.seed}), flush=True)
    importances = [seeded(cls, options.seed) for cls in variants(Importance)]
    allocations = [cls() for cls in variants(Allocation)]
    cache = cache_root(None).with_name("structured_pruning")
    for cell in cells(model, options.model, data, importances, allocations, BUDGETS, cache):
        print(json.dumps(cell | {"seed": options.seed}), flush=True)


if __name__ == "__main__":
    main()
