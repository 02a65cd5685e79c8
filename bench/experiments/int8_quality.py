"""What int8 gradients cost in quality: validation perplexity against `none`, three seeds, same data and order."""

import statistics
from pathlib import Path

from bench.experiments.runs import books, fit, say
from bench.tables import figures

RECORDS = "pretraining.jsonl"
SEEDS, CONFIG = (1, 2, 3), "configs/pretraining/gpt2_tiny.yaml"
ARMS = {"none": "NoCompression", "int8": "Int8"}


def run(records: Path, folder: Path) -> None:
    """Measure and append the figure."""
    ppl: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, compressor in ARMS.items():
            arguments = [*books(), "--seed_everything", str(seed), "--trainer.strategy.compressor", compressor]
            done = fit(folder / f"{arm}-{seed}", CONFIG, *arguments)
            ppl[arm].append(done.record["val_ppl"])
            say(f"{arm}, seed {seed}: validation perplexity {ppl[arm][-1]:.3f}")
    changes = [100 * (a / b - 1) for a, b in zip(ppl["int8"], ppl["none"], strict=True)]
    change, spread = statistics.mean(changes), figures.spread(changes)
    figures.append(
        records,
        figure="int8-quality",
        what=f"validation perplexity of `int8` over `none`, books, {len(SEEDS)} seeds (mean ± sd of the paired change)",
        value=change,
        spread=spread,
        unit="%",
        target="within 1 %",
        reached=abs(change) <= 1,
        command="python -m bench experiment int8_quality",
        details={"val_ppl": ppl, "change_percent": changes, "seeds": list(SEEDS)},
    )
