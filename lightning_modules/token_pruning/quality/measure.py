"""Suffixes read after pruned prompts: loss, accuracy, tokens kept and time, with confidence intervals.

Shape legend: B samples, N prompt tokens, M suffix tokens, V vocabulary.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality.tasks import Window, answered


@dataclass
class Arm:
    """Results of one scorer at one budget, a value per sample.

    Attributes:
        nll: Mean negative log-likelihood of the suffix, in nats per token.
        accuracy: Share of suffix tokens ranked first.
        kept: Tokens that the last layer works on, as a share of the prompt.
        milliseconds: Time of one pruned prefill of a batch, divided by its samples.
    """

    nll: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


@torch.no_grad()
def read(model: Any, window: Window, pruner: PromptPruner | None, arm: Arm) -> None:
    """Prefill the prompts, pruned or not, read the suffixes from the cache, and add what came out to ``arm``.

    Args:
        model: A causal language model in evaluation mode.
        window: On the model's device.
        pruner: None leaves the prompts whole; an oracle has looked at the window already.
        arm: Gets one value per sample.
    """
    rows, length = window.prompt.shape
    cache = DynamicCache(config=model.config)
    pruning: AbstractContextManager[Any] = nullcontext() if pruner is None else pruner.prefill(model)
    with pruning:
        _wait(window.prompt.device)
        started = time.perf_counter()
        first = model(input_ids=window.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        _wait(window.prompt.device)
        took = (time.perf_counter() - started) * 1e3
        places = torch.arange(length, length + window.suffix.shape[1], device=window.suffix.device)[None]
        after = model(
            input_ids=window.suffix, past_key_values=cache, use_cache=True, position_ids=places.expand(rows, -1)
        ).logits
    logits_BMV = torch.cat([first, after[:, :-1]], 1).float()
    nll = F.cross_entropy(logits_BMV.transpose(1, 2), window.labels, ignore_index=IGNORED, reduction="none").sum(1)
    right, asked = answered(logits_BMV, window.labels)
    arm.nll += (nll / asked.clamp_min(1)).tolist()
    arm.accuracy += (right / asked.clamp_min(1)).tolist()
    kept = cache.layers[-1].get_seq_length() - window.suffix.shape[1]
    arm.kept += [kept / length] * rows
    arm.milliseconds += [took / rows] * rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interval(values: Sequence[float] | Tensor, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap percentile interval (Efron 1979).

    Args:
        values: One per sample.
        seed: Of the resampling.
        resamples: Bootstrap samples.

    Returns:
        Mean, lower and upper end.
    """
    array = np.asarray(values, np.float64)
    draw = np.random.default_rng(seed)
    means = array[draw.integers(len(array), size=(resamples, len(array)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def proportion(successes: int, trials: int) -> tuple[float, float, float]:
    """A share and its 95 % interval after Wilson (JASA 22, 1927): honest near 0 and 1, where a bootstrap has no width.

    Returns:
        Share, lower and upper end.
    """
    share, z = successes / trials, 1.959964
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def summarise(task: str, scorer: str, keep: float | list[float] | None, arm: Arm, unpruned: Arm) -> dict[str, Any]:
    """One row of the frontier: an arm against the unpruned model, sample by sample.

    Returns:
        ``nll_rise`` and ``accuracy`` with intervals, ``kept``, ``prefill_ms`` (medians) and the number of samples.
    """
    rise, low, high = interval([pruned - whole for pruned, whole in zip(arm.nll, unpruned.nll, strict=True)])
    accuracy, accuracy_low, accuracy_high = interval(arm.accuracy)
    return {
        "task": task,
        "scorer": scorer,
        "keep": keep,
        "samples": len(arm.nll),
        "nll": float(np.mean(arm.nll)),
        "nll_rise": rise,
        "nll_rise_low": low,
        "nll_rise_high": high,
        "accuracy": accuracy,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "kept": float(np.mean(arm.kept)),
        "kept_by_sample": arm.kept if len(set(arm.kept)) > 1 else None,
        "prefill_ms": float(np.median(arm.milliseconds)),
        "prefill_ms_unpruned": float(np.median(unpruned.milliseconds)),
    }


def savings(arm: Arm, other: Arm) -> list[float]:
    """Loss in nats per token that ``arm`` saves over ``other`` on the same samples: mean, and its 95 % interval."""
    return list(interval([theirs - mine for mine, theirs in zip(arm.nll, other.nll, strict=True)]))
