"""What the original scripts claim to gain on Qwen2-7B, beside the FLOP bound of what they run. Nothing is timed.

The bounds of another model, as JSON lines; only its configuration is read:

python -m bench.experiments.prefill_claims --model FOLDER_OR_NAME --keep 0.9 0.8 0.7 --lengths 4096 32768
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from bench.tables import figures
from lightning_modules.loading import load_config
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.learned import Learned

RECORDS = "token_pruning.jsonl"
COMMAND = "python -m bench experiment prefill_claims"
QWEN2_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)
KEEP = (0.9, 0.8, 0.7)
SHORT = (1024, 2048, 4096)  # what the claimed means are over
SPEED = {0.9: 1.43, 0.8: 1.96, 0.7: 2.48}  # E-RECAP, one GPU, mean of SHORT
SAVED = {0.9: 12.2, 0.8: 23.8, 0.7: 35.0}  # per cent of FLOPs, E-RECAP


def run(records: Path, folder: Path) -> None:
    """Compute the bounds, and append a figure for each claim."""
    # what the scripts protect never exceeds a stage's budget
    lines = list(bounds(QWEN2_7B, Schedule(first=4, step=3, of="prompt", tail=0.0, min_tail=16), KEEP, (*SHORT, 32768)))
    found = {(line["keep"], line["length"]): line["bound"] for line in lines}
    for keep, claimed in SPEED.items():
        bound = statistics.mean(found[keep, length] for length in SHORT)
        _append(records, f"E-RECAP, one GPU, keep {keep}, mean of 1k, 2k and 4k tokens", claimed, bound, "×")
    for keep, claimed in SAVED.items():
        executed = 100 * statistics.mean(1 - 1 / found[keep, length] for length in SHORT)
        _append(records, f"E-RECAP, FLOPs saved, keep {keep}, mean of the same", claimed, executed, "%")
    _append(records, "SDTP, one GPU, keep 0.7, 4k tokens", 2.80, found[0.7, 4096], "×")
    _append(records, "E-RECAP, eight GPUs, keep 0.7, 32k tokens", 39.7, found[0.7, 32768], "×")
    _append(records, "the same, were every token dropped after layer 4 of 28", 39.7, lines[0]["cap"], "×")


def bounds(config: Any, schedule: Schedule, keep: Sequence[float], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Bounds of one prompt's prefill, trained scorers of the default width included.

    Args:
        config: A transformers configuration; no weights are needed.
        schedule: Where to prune; its ``keep`` is replaced.
        keep: Shares that every stage keeps of what it gets.
        lengths: Prompt lengths in tokens.

    Yields:
        ``keep``, ``length``, ``stages``, ``bound`` (greatest speed-up), ``mean_kept`` (share of the prompt that a
        layer works on, mean over layers), ``cap`` (all layers over those before the first stage: more than that no
        pruning can gain).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    cost = Cost.of(model)
    layers = len(cost.linear)
    stages = schedule.resolve(layers)
    scorer = Learned(TokenPruner(cost.hidden_size, stages))
    for share in keep:
        pruned = schedule.keeping(share)
        for length in lengths:
            yield {
                "keep": share,
                "length": length,
                "stages": stages,
                "bound": cost.bound(length, pruned, scorer),
                "mean_kept": sum(pruned.lengths(length, layers)) / layers / length,
                "cap": layers / (stages[0] + 1),
            }


def _append(records: Path, claim: str, claimed: float, bound: float, unit: str) -> None:
    figures.append(
        records,
        figure=f"claim: {claim}",
        what=f"FLOP bound of {claim} (claimed: {claimed} {unit})",
        value=bound,
        unit=unit,
        target="report",
        reached=None,
        command=COMMAND,
        details={"claim": f"{claim} ({unit})", "model": "Qwen2-7B", "claimed": claimed, "flop_bound": bound},
    )


def main() -> None:
    """Print a line for each share and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub name; no weights are read")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEP))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--first", type=int, default=4, help="first layer after which is pruned")
    parser.add_argument("--step", type=int, default=3, help="layers from stage to stage")
    parser.add_argument("--tail", type=float, default=0.1, help="share of the prompt at its end that always stays")
    options = parser.parse_args()
    schedule = Schedule(first=options.first, step=options.step, of="prompt", tail=options.tail, min_tail=16)
    for line in bounds(load_config(options.model), schedule, options.keep, options.lengths):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
