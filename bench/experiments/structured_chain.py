"""From a dense model to a pruned, recovered one that talks: the committed configurations one after another, timed."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

from bench import figures, record
from bench.experiments.runs import corpus, run_main, say

CONFIGS = "configs/structured_pruning"
STEPS = (  # command, configuration
    ("prune", "prune"),
    ("verify", "prune"),
    ("fit", "recover"),
    ("export", "export"),
    ("validate", "validate"),
    ("generate", "recover"),
)
LIMIT_MIN = 10


def run(records: Path, folder: Path, model: Path) -> None:
    """Run the chain in an empty folder, and append the time of each command and of all.

    Raises:
        RuntimeError: A command failed.
    """
    place = folder / "runs/llama_gqa/model"  # where the configurations look for the dense model
    place.parent.mkdir(parents=True)
    place.symlink_to(model.resolve(), target_is_directory=True)
    command = f"python -m bench experiment structured_chain --model {model.name}"
    took: dict[str, float] = {}
    with mock.patch.dict(os.environ, PARE_CACHE=str(folder / "cache")):
        for name, config in STEPS:
            talk = ["--prompt", "It was", "--max_new_tokens", "20"] if name == "generate" else corpus()
            took[name] = run_main(folder, name, f"{CONFIGS}/{config}.yaml", *talk)
            say(f"{name}: {took[name]:.0f} s")
    total = sum(took.values()) / 60
    figures.append(
        records,
        figure="structure-chain",
        what="prune, verify, fit, export, validate and generate from the committed configurations, empty cache; "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items()),
        value=total,
        unit="min",
        target=f"≤ {LIMIT_MIN} min",
        reached=total <= LIMIT_MIN,
        command=command,
        details={"seconds": took, "said": (folder / "output.log").read_text().strip().splitlines()[-1], **_ppl(folder)},
    )


def _ppl(folder: Path) -> dict[str, Any]:
    """Perplexities that the chain left behind: of the dense model, after pruning, after recovery."""
    found, _ = record.read(folder / "runs/results.jsonl")
    pruned = next(one["structure"] for one in found if one["run_name"] == "prune")  # verify, later, has the name too
    recovered = next(one for one in found if one["run_name"] == "recover")
    return {
        "ppl_dense": pruned["ppl_before"],
        "ppl_pruned": pruned["ppl_after"],
        "ppl_recovered": recovered["val_ppl"],
    }
