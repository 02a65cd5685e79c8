"""Every collective of the transport over NCCL with a single rank: it runs, and gives what went in."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.setting import Setting, at_most, found
from bench.network.collectives import operations
from strategies import transport
from strategies.compressors.int8 import Int8
from strategies.traffic import Traffic
from strategies.units import Unit

LIMIT_S, GPUS = 40.0, 1


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Whether torch's and the transport's kept their values, and the time of torch's."""
    backend = "nccl" if setting.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        sent = torch.arange(setting.size(1 << 24, 64), device=setting.device, dtype=torch.float32)
        received = torch.zeros_like(sent)
        dist.all_to_all_single(received, sent)
        apart = float((received - sent).abs().max())
        dist.all_reduce(received)
        yield at_most("values", f"difference after all-to-all and all-reduce by {backend}", apart, 0.0)
        for name, difference in _transported(sent.view(-1)).items():
            yield at_most(name, f"difference after the transport's {name} by {backend}", difference, 0.0)
        for name, operation in operations(sent.nbytes, setting.device).items():
            if name not in ("exchange", "point_to_point"):  # there is nobody else to send to
                yield found(name, f"{name} of {sent.nbytes / 1e6:.0f} MB", setting.milliseconds(operation), "ms")
    finally:
        dist.destroy_process_group()


def _transported(gradient: torch.Tensor) -> dict[str, float]:
    """How far each collective of the transport is from what a single rank has without it."""
    unit, codec = Unit("unit", [], gradient.numel(), None, Traffic()), Int8()
    gradient = gradient * torch.linspace(-1, 1, gradient.numel(), device=gradient.device)
    codes = codec.encode(gradient.view(1, -1), unit)
    decoded = codec.decode(codes, gradient.numel(), unit)[0]
    given = {
        "reduce_scatter_mean": (gradient, lambda out: transport.reduce_scatter_mean(gradient, out, unit)),
        "all_reduce_mean": (gradient, lambda out: transport.all_reduce_mean(out.copy_(gradient), unit)),
        "all_gather": (gradient, lambda out: transport.all_gather(gradient, out, unit)),
        "gather_parameters": (gradient, lambda out: transport.gather_parameters(gradient, out, unit)),
        "int8_reduce_scatter": (decoded, lambda out: codec.reduce_scatter(gradient, out, unit)),
        "int8_all_reduce": (decoded, lambda out: codec.all_reduce(out.copy_(gradient), unit)),
    }
    differences = {}
    for name, (wanted, collective) in given.items():
        out = torch.empty_like(gradient)
        collective(out)
        differences[name] = float((out - wanted).abs().max())
    gathered = codec.decode(transport.gather_encoded(codes, unit), gradient.numel(), unit)[0]
    return differences | {"gather_encoded": float((gathered - decoded).abs().max())}
