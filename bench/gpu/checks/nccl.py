"""Every collective of the transport over NCCL with a single rank: it runs, and gives what went in."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.setting import Setting, at_most, found
from bench.network.collectives import operations

LIMIT_S, GPUS = 40.0, 1


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Time of each, and whether an all-to-all and a reduction kept their values."""
    backend = "nccl" if setting.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        sent = torch.arange(setting.size(1 << 24, 64), device=setting.device, dtype=torch.float32)
        received = torch.zeros_like(sent)
        dist.all_to_all_single(received, sent)
        apart = float((received - sent).abs().max())
        dist.all_reduce(received)
        yield at_most("values", f"difference after all-to-all and all-reduce by {backend}", apart, 0.0)
        for name, operation in operations(sent.nbytes, setting.device).items():
            if name not in ("exchange", "point_to_point"):  # there is nobody else to send to
                yield found(name, f"{name} of {sent.nbytes / 1e6:.0f} MB", setting.milliseconds(operation), "ms")
    finally:
        dist.destroy_process_group()
