"""Does the hook change training? Losses of `none` and `none_a2a` against FSDP without a hook, 50 steps, same seed."""

import math
from collections.abc import Sequence
from pathlib import Path

from bench.experiments.runs import fit, say
from bench.tables import figures

RECORDS = "pretraining.jsonl"
STEPS, CONFIG = 50, "configs/pretraining/gpt2_tiny.yaml"
ARMS = {"native": "null", "none": "NoCompression", "none_a2a": "NoCompressionA2A"}


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    losses = {}
    for arm, compressor in ARMS.items():
        say(f"{arm}: {STEPS} steps")
        arguments = ["--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
        arguments += ["--trainer.strategy.compressor", compressor]
        losses[arm] = fit(folder / arm, CONFIG, *arguments).losses
    for arm in ("none", "none_a2a"):
        difference = largest([abs(losses[arm][step] - losses["native"][step]) for step in range(STEPS)])
        figures.append(
            records,
            figure=f"loss-agreement-{arm}",
            what=f"largest loss difference of `{arm}` from FSDP without a hook, {STEPS} steps",
            value=difference,
            unit="nats",
            target="≤ 1e-5",
            reached=difference <= 1e-5,
            command="python -m bench experiment loss_agreement",
        )


def largest(differences: Sequence[float]) -> float:
    """The largest of some numbers; NaN, which ``max`` passes over, where one is."""
    return max(differences, key=lambda one: (math.isnan(one), one))
