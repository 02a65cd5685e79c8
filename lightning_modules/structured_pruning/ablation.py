"""Every importance with every allocation and budget: perplexity before and after a short recovery, as JSON lines.

python -m lightning_modules.structured_pruning.ablation --model FOLDER --train train.json --val val.json

What `main.py prune` does, in one process: a model is loaded once, and parts are scored once for all budgets.
"""

import argparse
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from common.progress import stage
from common.variants import variants
from lightning_modules.data.cache import cache_root
from lightning_modules.data.text import TextCorpus
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.anatomy import decoder_layers, shape_of
from lightning_modules.structured_pruning.budget import channel_multiple, removed_parameters
from lightning_modules.structured_pruning.evaluation import first_blocks, ppl
from lightning_modules.structured_pruning.footprint import Anatomy
from lightning_modules.structured_pruning.importance import Importance
from lightning_modules.structured_pruning.iterative import short_recovery
from lightning_modules.structured_pruning.loading import load
from lightning_modules.structured_pruning.prune import Pruner
from lightning_modules.structured_pruning.slicing import slice_model

_CALIBRATION_BLOCKS = 128


def cells(
    model: Any,
    base: str,
    data: TextCorpus,
    importances: Sequence[Importance],
    allocations: Sequence[Allocation],
    budgets: Sequence[float],
    recovery_steps: int,
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
        recovery_steps: Optimizer steps of a short recovery on the calibration text; 0 leaves it out.
        cache: Folder for damages and scores.

    Yields:
        The names of a cell, its perplexity ``ppl``, and ``ppl_recovered``, None without recovery.
    """
    anatomy = Anatomy.of(model, torch.float32.itemsize)
    multiple = channel_multiple([shape_of(layer) for layer in decoder_layers(model)], None)
    batches = first_blocks(data.train_dataloader(), _CALIBRATION_BLOCKS)
    for importance, allocation in itertools.product(importances, allocations):
        pruner = Pruner(model, base, batches, importance, allocation, multiple, 0, cache, stage)
        for budget in budgets:
            target = removed_parameters(budget, "decoder", anatomy.footprint(data.block_size))
            pruned = slice_model(model, pruner.plan(target, {}))
            cell = {"importance": type(importance).__name__, "allocation": type(allocation).__name__, "budget": budget}
            cell["ppl"] = ppl(pruned, data.val_dataloader())
            cell["ppl_recovered"] = None
            if recovery_steps:
                recovered = short_recovery(pruned, batches, recovery_steps, learning_rate=1e-3)
                cell["ppl_recovered"] = ppl(recovered, data.val_dataloader())
            yield cell


def main() -> None:
    """Print a line for the dense model, then one a cell, as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "val"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the choice of calibration text")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    known = {cls.__name__: cls for cls in variants(Allocation)}
    parser.add_argument("--allocations", nargs="+", choices=known, default=["Uniform", "Inverse", "Global"])
    parser.add_argument("--recovery-steps", type=int, default=0)
    parser.add_argument("--max-val-blocks", type=int, default=48)
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    model, _ = load(options.model)
    data = TextCorpus(
        options.train,
        options.val,
        tokenizer=options.model,
        block_size=256,
        batch_size=8,
        max_val_blocks=options.max_val_blocks,
    )
    data.prepare_data()
    data.setup("fit")
    print(json.dumps({"dense": ppl(model, data.val_dataloader()), "seed": options.seed}), flush=True)
    importances = [
        cls(**({"seed": options.seed} if "seed" in inspect.signature(cls).parameters else {}))
        for cls in variants(Importance)
    ]
    allocations = [known[name]() for name in options.allocations]
    folder = cache_root(None).with_name("structured_pruning")
    arguments = (importances, allocations, options.budgets, options.recovery_steps, folder)
    for cell in cells(model, options.model, data, *arguments):
        print(json.dumps(cell | {"seed": options.seed}), flush=True)


if __name__ == "__main__":
    main()
