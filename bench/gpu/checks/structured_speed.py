"""Prefill and decoding of a decoder with a quarter of it removed, beside what its FLOPs and bytes allow."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig

from bench.gpu.models import on_device
from bench.gpu.setting import Setting, at_least, found
from callbacks.inference_timing import InferenceTiming

LIMIT_S, GPUS = 60.0, 1
_OF_BOUND = 0.85
_MUCH = 3.0  # times as long as reading the bytes takes
_WIDE = {"hidden_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Speed-ups over the dense model, in turns with it."""
    shape: dict[str, Any] = {"vocab_size": setting.size(32000, 256), **(_TINY if setting.tiny else _WIDE)}
    widths = (128, 80) if setting.tiny else (14336, 9728)
    models = {
        name: on_device(LlamaConfig(intermediate_size=width, max_position_embeddings=8192, **shape), setting)
        for name, width in zip(("dense", "pruned"), widths, strict=True)
    }
    timing = InferenceTiming(
        prompt_tokens=setting.size(2048, 16), new_tokens=setting.size(32, 2), repeats=setting.size(10, 1)
    )
    source = torch.zeros(setting.size(1 << 26, 1 << 20), device=setting.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / setting.milliseconds(lambda: target.copy_(source))
    for phase, batch in (("prefill", 1), ("prefill", 4), ("decode", 1), ("decode", 16)):
        row = timing.measure(models, phase, batch)
        bound = row["flop_bound" if phase == "prefill" else "byte_bound"]
        what = f"{phase}, batch {batch}, pruned over dense (bound {bound:.2f} ×)"
        if phase == "prefill":
            figure = at_least(f"{phase}-{batch}", what, row["speedup"], _OF_BOUND * bound, "×", **row)
        else:
            row |= {"dense_bytes_ms": row["work_dense"]["bytes_read"] / bandwidth}
            if bound_by_launches(row):
                what += ", bound by launches, not bytes"
            figure = found(f"{phase}-{batch}", what, row["speedup"], "×", **row)
        yield figure | {"spread": row["speedup_spread"]}


def bound_by_launches(row: dict[str, Any]) -> bool:
    """Whether decoding takes several times as long as reading its bytes does, as on fast GPUs: pruning saves little."""
    return bool(row["dense_ms"] > _MUCH * row["dense_bytes_ms"])
