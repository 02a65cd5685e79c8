"""How long scoring will take, before it begins: one row of text is timed, and what is still to do is counted in it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.progress import duration
from lightning_modules.batches import Batch, logits


def expected_time(work: Mapping[str, float], model: Any, batches: Sequence[Batch]) -> str:
    """What is still to be measured and how long it will take, as a line.

    Args:
        work: Token passes of each measurement: tokens that go through the model, as many times as they do, a backward
            pass counted in forward passes.
        model: The model.
        batches: Its text; the first row is timed where anything is to be measured.
    """
    if not work:
        return "scoring: everything is measured already"
    seconds = seconds_per_token(model, batches)
    parts = ", ".join(f"{what} {duration(tokens * seconds)}" for what, tokens in work.items())
    return f"scoring: about {duration(sum(work.values()) * seconds)} ({parts})"


@torch.no_grad()
def seconds_per_token(model: Any, batches: Sequence[Batch]) -> float:
    """Seconds of a forward pass over the first row of text, without its first touch of weights, per token."""
    row = {name: part[:1] for name, part in batches[0].items()}
    logits(model, {name: part[:, :8] for name, part in row.items()})
    started = time.perf_counter()
    logits(model, row)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / row["input_ids"].numel()
