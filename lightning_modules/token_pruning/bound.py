"""What pruned prefill can gain at best on a model, by floating-point operations, as JSON lines; no weights are loaded.

python -m lightning_modules.token_pruning.bound --model FOLDER_OR_NAME --keep 0.9 0.8 0.7 --lengths 4096 32768
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_modules.loading import load_config
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.mlp import MLP


def bounds(config: Any, schedule: Schedule, keep: Sequence[float], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Bounds of one prompt's prefill, trained scorers of the default width included.

    Args:
        config: A transformers configuration.
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
    scorer = MLP(TokenPruner(cost.hidden_size, stages))
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


def main() -> None:
    """Print a line for each share and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub name; no weights are read")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--first", type=int, default=4, help="first layer after which is pruned")
    parser.add_argument("--step", type=int, default=3, help="layers from stage to stage")
    parser.add_argument("--tail", type=float, default=0.1, help="share of the prompt at its end that always stays")
    options = parser.parse_args()
    schedule = Schedule(first=options.first, step=options.step, tail=options.tail)
    for line in bounds(load_config(options.model), schedule, options.keep, options.lengths):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
