"""Error of the mean, bytes counted and bytes on the wire of every method, as JSON lines on rank 0.

torchrun --nproc-per-node 2 -m bench.side_by_side --gradients gauss
"""

import argparse
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.side_by_side.gradients import SOURCES
from bench.side_by_side.references import Reduce, references
from common.variants import variants
from strategies.compressors import Compressor
from strategies.traffic import Traffic
from strategies.units import ParameterSlice, Unit


def examples() -> list[Compressor]:
    """The instances that the law tests run, without wrappers around another method: those send what it sends."""
    found = [example for cls in variants(Compressor) for example in cls.examples()]
    return [c for c in found if not isinstance(getattr(c, "inner", None), Compressor)]


class Counters:
    """Bytes and packets that an interface has sent."""

    def __init__(self, interface: str | None) -> None:
        self._folder = Path(f"/sys/class/net/{interface}/statistics") if interface else None

    def read(self) -> tuple[int, int]:
        """Both since the machine started; zero without an interface."""
        if self._folder is None:
            return 0, 0
        return tuple(int((self._folder / name).read_text()) for name in ("tx_bytes", "tx_packets"))  # type: ignore


def measure(reduce: Reduce, grads: Tensor, counters: Counters) -> dict[str, Any]:
    """Reduce the gradient of every step; the error is the last step's, so that states have settled."""
    mean = torch.zeros(1)
    dist.barrier()
    bytes_before, packets_before = counters.read()
    for step, grad in enumerate(grads):
        mean = reduce(grad.clone(), step)
    # A rank may be done sending while others still receive; what follows belongs to the next method.
    bytes_after, packets_after = counters.read()
    dist.barrier()
    wanted = grads[-1].double()
    dist.all_reduce(wanted)
    wanted /= dist.get_world_size()
    part = slice(None) if mean.numel() == wanted.numel() else shard(wanted.numel())
    sums = torch.stack([(mean.double() - wanted[part]).square().sum(), wanted[part].square().sum()])
    dist.all_reduce(sums)
    sent = {"bytes_nic": bytes_after - bytes_before, "packets_nic": packets_after - packets_before}
    return {"nmse": (sums[0] / sums[1]).item(), **(sent if bytes_after else {})}


def shard(numel: int) -> slice:
    """This rank's elements of a unit."""
    size = numel // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def of_pare(compressor: Compressor, parameters: list[ParameterSlice], grads: Tensor, counters: Counters) -> dict:
    """A compressor's figures; the residual of a method that feeds errors back counts as error."""
    unit = Unit("unit", parameters, grads.shape[1], None, Traffic(), seed=1)
    output = torch.empty(grads.shape[1] // dist.get_world_size())

    def reduce(grad: Tensor, step: int) -> Tensor:
        unit.step = step
        compressor.reduce_scatter(grad, output, unit)
        return output

    with torch.no_grad():
        figures = measure(reduce, grads, counters)
    return figures | {"bytes_counted": unit.traffic.take().gradient_bytes()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.side_by_side", description=__doc__)
    parser.add_argument("--gradients", choices=SOURCES, default="gauss", help="where the gradients come from")
    parser.add_argument("--steps", type=int, default=8, help="gradients in a row")
    parser.add_argument("--nic", help="also read this interface's counter of sent bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    counters = Counters(arguments.nic)
    grads, parameters = SOURCES[arguments.gradients](arguments.steps)
    grads = grads[:, : grads.shape[1] // dist.get_world_size() * dist.get_world_size()]
    common = {
        "gradients": arguments.gradients,
        "world_size": dist.get_world_size(),
        "elements": grads.shape[1],
        "steps": arguments.steps,
    }

    def say(method: str, family: str, figures: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            print(json.dumps({"method": method, "family": family, **common, **figures}), flush=True)

    for compressor in examples():
        say(repr(compressor), "pare", of_pare(compressor, parameters, grads, counters))
    for name, reduce in references(parameters).items():
        say(name, "reference", measure(reduce, grads, counters))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
