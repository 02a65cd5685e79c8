"""DDP with buckets that never change, and the one place that touches DDP's private attributes."""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.names import clean_name
from strategies.traffic import Traffic
from strategies.units import ParameterSlice, Unit

# Buffers are not trained here; broadcasting them in every forward pass would be traffic that nobody counts. torch 2.13
# warns about the old name of the argument and knows a new one.
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}


class FixedBuckets(DistributedDataParallel):
    """``DistributedDataParallel`` whose buckets are the same from the first step to the last, and after a resume.

    DDP starts with one bucket for everything and after the first backward pass cuts new ones, in the order in which
    gradients became ready. A compressor would see other blocks in the first step than in the second, its state would
    belong to a bucket that is gone, and a resumed run would repeat this with its own first step. Here the order is the
    reverse of registration, near to that of backward, and DDP is told so before the first step.

    Args:
        module: The module to train.
        device_ids: As for ``DistributedDataParallel``.
        bucket_cap_mb: Size of a bucket in MiB.

    Attributes:
        failure: What went wrong first in a thread that reduces. DDP, which waits for it, says "Unable to cast … to
            Tensor" and not what kind of error it is.
    """

    failure: Exception | None = None

    def __init__(self, module: nn.Module, device_ids: list[int] | None, bucket_cap_mb: int) -> None:
        super().__init__(module, device_ids=device_ids, bucket_cap_mb=bucket_cap_mb, **KEEP_BUFFERS)
        self.reducer._push_all_rebuilt_params()  # what DDP records in its first backward pass: the order
        if not self.reducer._rebuild_buckets():
            raise RuntimeError("this version of torch does not fix DDP's buckets before the first step")

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]


def bucket_units(model: FixedBuckets, traffic: Traffic, group: dist.ProcessGroup | None = None) -> list[Unit]:
    """One unit per bucket, in DDP's order; a bucket holds its parameters one after the other without padding.

    Args:
        model: The wrapped module.
        traffic: This rank's counters.
        group: The ranks that reduce a bucket; by default all.
    """
    group = model.process_group if group is None else group
    buckets = [bucket.parameters() for bucket in model.reducer._get_zeros_like_grad_buckets()]
    return _units(model.module, buckets, traffic, group)


def planned_units(
    module: nn.Module, bucket_cap_mb: int, traffic: Traffic, group: dist.ProcessGroup | None = None
) -> list[Unit]:
    """The same as after wrapping ``module``, which may be without memory ("meta"), without wrapping it."""
    trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    trained.reverse()
    caps = [min(dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_cap_mb << 20), bucket_cap_mb << 20]
    cut, _ = dist._compute_bucket_assignment_by_size(trained, caps)
    return _units(module, [[trained[i] for i in bucket] for bucket in cut], traffic, group)


def _units(
    module: nn.Module, buckets: list[list[Tensor]], traffic: Traffic, group: dist.ProcessGroup | None
) -> list[Unit]:
    names = {id(p): clean_name(name) for name, p in module.named_parameters()}
    units = []
    for number, bucket in enumerate(buckets):
        slices, offset = [], 0
        for parameter in bucket:
            slices.append(ParameterSlice(names[id(parameter)], tuple(parameter.shape), offset))
            offset += parameter.numel()
        units.append(Unit(f"bucket {number}", slices, offset, group, traffic))
    return units


def install_hook(
    model: FixedBuckets, units: list[Unit], reduce: Callable[[Unit, Tensor], None], overlap: bool = True
) -> None:
    """Have DDP call ``reduce(unit, grad [N])``, which writes the mean in place, whenever a bucket is full.

    With ``overlap`` the backward pass goes on meanwhile: on CUDA reductions have a stream of their own, on the CPU a
    thread, one after another in the order in which buckets fill. DDP waits for the last one.

    Args:
        model: The wrapped module.
        units: Its buckets, from ``bucket_units``.
        reduce: The reduction.
        overlap: Whether backward goes on.
    """
    device = next(model.parameters()).device
    stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
    worker = ThreadPoolExecutor(1, "reduce") if overlap and device.type == "cpu" else None

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        unit, grad = units[bucket.index()], bucket.buffer()
        if grad.numel() != unit.numel:
            raise RuntimeError(f"{unit.name} has {grad.numel()} elements instead of {unit.numel}: buckets were rebuilt")
        future: torch.futures.Future[Tensor]
        if stream is not None:
            future = torch.futures.Future(devices=[grad.device])
            stream.wait_stream(torch.cuda.current_stream())  # the gradients are complete when this stream gets there
            with torch.cuda.stream(stream):
                reduce(unit, grad)
                future.set_result(grad)  # records an event on this stream; whoever waits, waits for it
            return future
        future = torch.futures.Future()
        if worker is None:
            reduce(unit, grad)
            future.set_result(grad)
        else:
            worker.submit(aside, unit, grad, future)
        return future

    def aside(unit: Unit, grad: Tensor, future: Any) -> None:
        try:
            with torch.no_grad():
                reduce(unit, grad)
        except Exception as error:
            model.failure = model.failure or error
            future.set_exception(error)  # ends the backward pass where DDP waits
        else:
            future.set_result(grad)

    model.register_comm_hook(None, hook)
