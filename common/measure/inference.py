"""Prefill and decode of two models beside each other, and what their work allows at best."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from common.measure.timing import interleaved, percentiles, ratio_with_spread

_NOISE = 1.1  # a speed-up above its bound by more than this is an error of measurement


@dataclass(frozen=True)
class Work:
    """What a computation must do at least.

    Attributes:
        flops: Floating-point operations.
        bytes_read: Weights and cached keys and values that must be read.
    """

    flops: float
    bytes_read: float


def prefill_work(
    decoder_flops_per_token: float, head_flops: float, weight_bytes: float, batch: int, tokens: int
) -> Work:
    """Work of reading ``batch`` prompts of ``tokens`` tokens, with scores of the last token alone."""
    return Work(batch * (tokens * decoder_flops_per_token + head_flops), weight_bytes)


def decode_work(
    weight_flops_per_token: float, weight_bytes: float, kv_bytes_per_token: float, batch: int, context: int
) -> Work:
    """Work of one decoding step: every weight and the whole cache are read once."""
    return Work(batch * weight_flops_per_token, weight_bytes + batch * context * kv_bytes_per_token)


def compare_models(
    dense: Callable[[], object],
    pruned: Callable[[], object],
    work: tuple[Work, Work],
    repeats: int,
    per: int = 1,
) -> dict[str, Any]:
    """Time both in turns; medians in ms, the speed-up, and the most it can be.

    A computation is bound by its FLOPs, or by the bytes it reads, so a speed-up cannot exceed the larger of the two
    ratios. Where it does by more than 10 %, the result is marked ``suspicious``.

    Args:
        dense: Runs the dense model.
        pruned: Runs the pruned model.
        work: Work of one step of the dense and of the pruned model.
        repeats: Timed rounds.
        per: Steps that one call makes.
    """
    times = interleaved({"dense": dense, "pruned": pruned}, repeats)
    found = ratio_with_spread(times["dense"], times["pruned"])
    flop_bound, byte_bound = work[0].flops / work[1].flops, work[0].bytes_read / work[1].bytes_read
    fields: dict[str, Any] = {"speedup": found["ratio"], "speedup_spread": found["spread"]}
    for name, samples in times.items():
        summary = percentiles([ms / per for ms in samples])
        fields |= {f"{name}_ms": summary["p50"], f"{name}_ms_iqr": summary["iqr"]}
    return fields | {
        "flop_bound": flop_bound,
        "byte_bound": byte_bound,
        "suspicious": found["ratio"] > _NOISE * max(flop_bound, byte_bound),
        "repeats": repeats,
        "work_dense": asdict(work[0]),
        "work_pruned": asdict(work[1]),
    }
