"""Prefill of 4k to 32k tokens by a model shaped like Qwen2-7B, pruned and not, beside the FLOP bound.

Weights are random and in bfloat16: what is kept is of no use, how long it takes does not depend on that. Scores come
from the attention of the last window, which needs no training.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Qwen2Config

from bench.experiments.prefill_claims import QWEN2_7B
from bench.gpu.models import on_device
from bench.gpu.setting import Setting, at_least, found
from callbacks.prefill_timing import everything, pruned_read, read
from common.measure.memory import peak_bytes
from common.measure.peaks import peak_flops
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.last_window import LastWindow

LIMIT_S, GPUS = 140.0, 1
LENGTHS = (4096, 8192, 16384, 32768)
_OF_BOUND = 0.85
_TINY = Qwen2Config(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """A speed-up for every length, and how near the plain model comes to the peak."""
    began = time.monotonic()
    model = on_device(_TINY if setting.tiny else QWEN2_7B, setting)
    cost, layers = Cost.of(model), model.config.num_hidden_layers
    scorer, schedule, took = LastWindow(), Schedule(keep=0.7), 0.0
    for length in (96, 128) if setting.tiny else LENGTHS:
        if time.monotonic() - began + 2.5 * took > 0.8 * LIMIT_S:
            yield found(str(length), f"prefill of {length} tokens: left out, it would take too long here", None, "×")
            continue
        before = time.monotonic()
        try:
            yield from _at(setting, model, cost, layers, scorer, schedule, length)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield found(str(length), f"prefill of {length} tokens: does not fit into the GPU's memory", None, "×")
        took = time.monotonic() - before


def _at(
    setting: Setting, model: Any, cost: Cost, layers: int, scorer: LastWindow, schedule: Schedule, length: int
) -> Iterator[dict[str, Any]]:
    ids = torch.randint(model.config.vocab_size, (1, length), device=setting.device)
    arms = {
        "plain": lambda: read(model, ids),
        "pruned": pruned_read(model, ids, PromptPruner(scorer, schedule)),
        "keep-1.0": pruned_read(model, ids, PromptPruner(scorer, everything(schedule, layers))),
    }
    with torch.inference_mode():
        times = interleaved(arms, setting.size(5, 1))
        peaks = {name: peak_bytes(arm, setting.device) for name, arm in arms.items()}
    ms = {name: percentiles(taken)["p50"] for name, taken in times.items()}
    faster, bound = ratio_with_spread(times["plain"], times["pruned"]), cost.bound(length, schedule, scorer)
    peak = peak_flops(setting.device, setting.dtype)
    rate = cost.prefill([length] * layers) / ms["plain"] * 1e3
    numbers = {"ms": ms, "peak_bytes": peaks, "bound": bound, "suspicious": faster["ratio"] > 1.3 * bound}
    what = f"prefill of {length} tokens, pruned over plain (FLOP bound {bound:.2f} ×)"
    figure = at_least(str(length), what, faster["ratio"], _OF_BOUND * bound, "×", **numbers)
    yield figure | {"spread": faster["spread"]}
    yield found(f"{length}-overhead", f"{length} tokens, every one kept, over plain", ms["keep-1.0"] / ms["plain"], "×")
    yield found(f"{length}-rate", f"{length} tokens, plain: share of peak FLOP/s", rate / peak if peak else None)
