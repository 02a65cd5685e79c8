"""The best mix of tiers after a million tokens of fine-tuning, over the dense model tuned alike; see `block_tuning`."""

from collections.abc import Mapping
from pathlib import Path

from bench.experiments.block_tuning import ARMS, tune

RECORDS = "block_peers.jsonl"
COMMAND = "python -m bench experiment block_million --model FOLDER --texts NAME=FILE,NAME=FILE"
TOKENS, SEEDS = 1_000_000, (1,)
LIMIT = 1.25  # times the dense model's perplexity


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Measure and append the figures. Arguments and errors as for ``block_peers.run``."""
    chosen = {name: ARMS[name] for name in ("dense", "mix-oneshot")}
    tune(records, folder, model, texts, chosen, TOKENS, SEEDS, COMMAND, "million", {"mix-oneshot": LIMIT})
