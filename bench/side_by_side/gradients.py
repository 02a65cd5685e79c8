"""Gradients to compare methods on, the same for every method: [steps, N] of this rank, and where parameters lie."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from strategies.units import ParameterSlice

_MATRIX = (2048, 2048)
_DEVIATION = 1e-3
Gradients = tuple[Tensor, list[ParameterSlice]]


def gauss(steps: int) -> Gradients:
    """Independent Gaussian elements of one 2048×2048 matrix: what published errors assume."""
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    numel = _MATRIX[0] * _MATRIX[1]
    return torch.randn(steps, numel, generator=draw) * _DEVIATION, [ParameterSlice("matrix", _MATRIX, 0)]


def uneven(steps: int) -> Gradients:
    """The same, times a log-normal scale for every 512 elements: rows of real gradients differ in size as much."""
    grads, parameters = gauss(steps)
    draw = torch.Generator().manual_seed(0)
    scales = torch.exp(1.5 * torch.randn(grads.shape[1] // 512, generator=draw))
    return grads * scales.repeat_interleave(512), parameters


def transformer(steps: int, warm_up: int = 30) -> Gradients:
    """A block of a small byte-level GPT-2, early in training on torch's own source, each rank on its own part."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, and only needed here

    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 256, "n_positions": 128, "n_embd": 256, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=None))
    block = {name: p for name, p in model.named_parameters() if name.startswith("transformer.h.1.")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.tensor(list(inspect.getsource(F).encode()), dtype=torch.int64)
    world, rank, batch = dist.get_world_size(), dist.get_rank(), 8
    rows = text[: text.numel() // 128 * 128].view(-1, 128)
    kept = []
    for step in range(warm_up + steps):
        first = (step * world + rank) * batch
        ids = rows[torch.arange(first, first + batch) % len(rows)]
        logits = model(input_ids=ids).logits
        optimizer.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        if step >= warm_up:
            kept.append(torch.cat([p.grad.flatten() for p in block.values() if p.grad is not None]))
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world)
        optimizer.step()
    slices, offset = [], 0
    for name, parameter in block.items():
        slices.append(ParameterSlice(name, tuple(parameter.shape), offset))
        offset += parameter.numel()
    return torch.stack(kept), slices


SOURCES: dict[str, Callable[[int], Gradients]] = {"gauss": gauss, "uneven": uneven, "transformer": transformer}
