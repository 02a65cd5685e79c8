"""One gradient through one compressor on real ranks."""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

from bench.side_by_side.oracles import parameters
from strategies import transport
from strategies.traffic import Traffic
from strategies.units import Unit


def gradient(rank: int, numel: int, step: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 + rank + 1000 * step)) * 1e-3


def make_unit(numel: int, step: int = 0, seed: int = 0) -> Unit:
    return Unit("unit", parameters(numel), numel, dist.group.WORLD, Traffic(), seed=seed, step=step)


@contextmanager
def bytes_passed_on():
    """A list of the bytes that each collective call makes leave this rank, by what is really handed to it."""
    passed: list[float] = []
    n = dist.get_world_size()
    scatter, gather, reduction, exchange = (
        transport._reduce_scatter,
        transport._all_gather,
        dist.all_reduce,
        dist.batch_isend_irecv,
    )

    def counting_scatter(output, given, **kwargs):
        passed.append(2 * given.nbytes * (n - 1) / n)  # gloo runs an all-reduce
        return scatter(output, given, **kwargs)

    def counting_gather(output, given, **kwargs):
        passed.append(given.nbytes * (n - 1))
        return gather(output, given, **kwargs)

    def counting_reduction(given, *args, **kwargs):
        passed.append(2 * given.nbytes * (n - 1) / n)
        return reduction(given, *args, **kwargs)

    def counting_exchange(operations):
        passed.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return exchange(operations)

    with (
        mock.patch.object(transport, "_reduce_scatter", counting_scatter),
        mock.patch.object(transport, "_all_gather", counting_gather),
        mock.patch.object(dist, "all_reduce", counting_reduction),
        mock.patch.object(dist, "batch_isend_irecv", counting_exchange),
    ):
        yield passed


def reduce(compressor, size: int, edit=None, step: int = 0, seed: int = 0):
    """Reduce one gradient of n·size elements; the shard, the counted and the really passed bytes."""
    rank, n = dist.get_rank(), dist.get_world_size()
    grad = gradient(rank, size * n)
    if edit is not None:
        edit(rank, grad)
    unit, output = make_unit(size * n, step, seed), torch.full((size,), torch.nan)
    with bytes_passed_on() as passed:
        compressor.reduce_scatter(grad, output, unit)
    return output, unit.traffic.take().gradient_bytes(), sum(passed)


def exact(size: int, n: int, edit=None) -> torch.Tensor:
    grads = [gradient(rank, size * n) for rank in range(n)]
    if edit is not None:
        for rank, grad in enumerate(grads):
            edit(rank, grad)
    return torch.stack(grads).mean(0)
