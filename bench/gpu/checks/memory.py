"""Memory filled to the last block: running out is an error that can be survived, and everything comes back."""

import gc
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.setting import Setting, at_least, at_most
from common.measure.memory import limit_process

LIMIT_S, GPUS = 30.0, 1


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Fill, run out, free, compute; twice."""
    block, total = setting.size(1 << 28, 1 << 24), 1 << 27
    if setting.device.type == "cuda":
        total = torch.cuda.mem_get_info(setting.device)[0]
    else:
        limit_process(total)
    for turn in (1, 2):
        filled = _fill(setting.device, block)
        yield at_least(f"filled-{turn}", f"share of free memory filled, turn {turn}", filled / total, 0.5)
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated(setting.device)
        yield at_most("left", "bytes that stay allocated afterwards", left, 0, "bytes")
    ones = torch.ones(64, 64, device=setting.device)
    yield at_most("product", "error of a product afterwards", float((ones @ ones - 64).abs().max()), 0.0)


def _fill(device: torch.device, block: int) -> int:
    """Allocate and touch blocks until there is no more; the bytes that there were."""
    held: list[torch.Tensor] = []
    try:
        while True:
            held.append(torch.zeros(block, dtype=torch.uint8, device=device))
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU it is a plain RuntimeError
        if "memory" not in str(error):
            raise
    return len(held) * block
