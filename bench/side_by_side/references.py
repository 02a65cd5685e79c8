"""What stands beside Pare's methods: torch's own DDP hooks, and formulas found in other systems that lose gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from strategies.units import ParameterSlice

Reduce = Callable[[Tensor, int], Tensor]
"""This rank's gradient ``[N]`` and the step → the mean over ranks as every rank understands it ``[N]``."""


class _Given(nn.Module):
    """A module whose parameters get exactly the gradient that is multiplied with them."""

    def __init__(self, parameters: list[ParameterSlice]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(p.shape) for p in parameters)

    def forward(self, grad: Tensor) -> Tensor:
        parts = grad.split([weight.numel() for weight in self.weights])
        return sum((w.flatten() * g).sum() for w, g in zip(self.weights, parts, strict=True))


def _hooked(parameters: list[ParameterSlice], hook: Callable[..., Any], state: Any = None) -> Reduce:
    """DDP with one of torch's hooks, all parameters in one bucket."""
    model = DistributedDataParallel(_Given(parameters), bucket_cap_mb=1 << 10)
    model.register_comm_hook(state, hook)

    def reduce(grad: Tensor, step: int) -> Tensor:
        model.zero_grad()
        model(grad).backward()
        return torch.cat([w.grad.flatten() for w in model.module.weights])

    return reduce


def summed_int8(grad: Tensor, step: int) -> Tensor:
    """int8 codes added by the collective: each rank may use only 127 // n levels, or the sum would overflow."""
    world = dist.get_world_size()
    largest = grad.abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    levels = max(127 // world, 1)
    codes = (grad / largest * levels).round().to(torch.int8)
    dist.all_reduce(codes)
    return codes.float() * largest / levels / world


def overflowing_int8(grad: Tensor, step: int) -> Tensor:
    """int8 codes of 127 levels added in int8: sums wrap around."""
    largest = grad.abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    codes = (grad / largest * 127).round().to(torch.int8)
    dist.all_reduce(codes)
    return codes.float() * largest / 127 / dist.get_world_size()


def one_scale_int8(grad: Tensor, step: int) -> Tensor:
    """int8 with one scale for the whole flat gradient of all ranks, averaged in fp32: outliers set everyone's step."""
    largest = grad.abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    codes = (grad / largest * 127).round().to(torch.int8)
    return torch.stack(_gathered(codes)).float().mean(0) * largest / 127


def _gathered(codes: Tensor) -> list[Tensor]:
    """Every rank's codes: n − 1 whole tensors arrive, where a reduction needs two shares of one."""
    received = [torch.empty_like(codes) for _ in range(dist.get_world_size())]
    dist.all_gather(received, codes)
    return received


def torch_per_tensor(grad: Tensor, step: int) -> Tensor:
    """What torch's ``quantization_pertensor_hook`` computes; the hook itself fails on gloo (torch 2.13)."""
    observer = MinMaxObserver()
    observer(grad)
    qparams = torch.stack([value.flatten()[0].float() for value in observer.calculate_qparams()])
    codes = quantization_hooks._quantize_per_tensor_backend(grad, *qparams)
    pairs = zip(_gathered(codes), _gathered(qparams), strict=True)
    return torch.stack([quantization_hooks._dequantize_per_tensor_backend(c, *q) for c, q in pairs]).mean(0)


def torch_per_channel(grad: Tensor, step: int, bucket_size: int = 512) -> Tensor:
    """What torch's ``quantization_perchannel_hook`` computes; the hook itself fails on gloo (torch 2.13)."""
    channels = F.pad(grad, (0, bucket_size - grad.numel() % bucket_size)).view(-1, bucket_size)
    observer = PerChannelMinMaxObserver()
    observer(channels)
    qparams = torch.stack([value.float() for value in observer.calculate_qparams()])
    codes = quantization_hooks._quantize_per_channel_backend(channels, *qparams)
    pairs = zip(_gathered(codes), _gathered(qparams), strict=True)
    decoded = [quantization_hooks._dequantize_per_channel_backend(c, *q) for c, q in pairs]
    return torch.stack(decoded).mean(0).flatten()[: grad.numel()]


def references(parameters: list[ParameterSlice]) -> dict[str, Reduce]:
    """Every reference by name, fresh."""
    low_rank = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    return {
        "torch DDP fp16_compress_hook": _hooked(parameters, default_hooks.fp16_compress_hook),
        "torch DDP powerSGD_hook, rank 4": _hooked(parameters, powerSGD_hook.powerSGD_hook, low_rank),
        "torch DDP quantization_pertensor_hook": torch_per_tensor,
        "torch DDP quantization_perchannel_hook": torch_per_channel,
        "formula: int8 summed by the collective, 127 // n levels": summed_int8,
        "formula: int8 summed by the collective, wrapping": overflowing_int8,
        "formula: int8, one scale for the whole gradient": one_scale_int8,
    }
