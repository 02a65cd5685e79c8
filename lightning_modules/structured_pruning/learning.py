"""Learning of one layer's MLP from what it should give: gradient steps on cached states, no backward pass of the model.

Layer-wise (block-wise) reconstruction: BRECQ (arXiv 2102.05426) in quantisation, ThiNet (arXiv 1707.06342) in pruning.

Shape legend: R rows, T tokens, H hidden size.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

HELD_OUT = 8  # one row in so many
_WARMUP = 0.1  # share of the steps


class Row(NamedTuple):
    """One row of calibration text without padding.

    Attributes:
        given: What the MLP is given, ``[T, H]``.
        wanted: What it should give, ``[T, H]``.
        weights: What each token counts, ``[T]``.
    """

    given: Tensor
    wanted: Tensor
    weights: Tensor


class Learned(NamedTuple):
    """Error on rows held out, as a share of Σ w ‖wanted‖²; ``after`` is no larger, or the MLP is as it was."""

    before: float
    after: float


def learn(mlp: Any, rows: Sequence[Row], steps: int, learning_rate: float, rows_a_step: int, seed: int = 0) -> Learned:
    """Let all matrices of an MLP learn to give what is wanted, in place.

    Adam in float32 with a cosine to zero; the MLP computes in its own dtype. One row in ``HELD_OUT`` is not learnt, and
    what was learnt stays only where it is nearer on these.

    Args:
        mlp: A module of matrices.
        rows: Calibration text, two at least.
        steps: Optimizer steps.
        learning_rate: At its highest.
        rows_a_step: Rows that a step learns from, drawn anew each time all have been.
        seed: Of the order.
    """
    learnt, held_out = [row for i, row in enumerate(rows) if i % HELD_OUT], rows[::HELD_OUT]
    original = {name: part.detach().clone() for name, part in mlp.named_parameters()}
    before = _share(mlp, original, held_out)
    found = {name: part.float().clone().requires_grad_(True) for name, part in original.items()}
    optimizer = torch.optim.Adam(found.values(), lr=learning_rate, betas=(0.9, 0.95))
    draw, order = torch.Generator().manual_seed(seed), list[int]()
    with torch.enable_grad():
        for step in range(steps):
            order = order or torch.randperm(len(learnt), generator=draw).tolist()
            chosen, order = [learnt[i] for i in order[:rows_a_step]], order[rows_a_step:]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _rate(step, steps)
            current = {name: part.to(original[name].dtype) for name, part in found.items()}
            optimizer.zero_grad()
            error, energy = _error(mlp, current, chosen)
            (error / energy).backward()
            optimizer.step()
    learned = {name: part.detach().to(original[name].dtype) for name, part in found.items()}
    after = _share(mlp, learned, held_out)
    if not after < before:  # also for NaN
        return Learned(before, before)
    with torch.no_grad():
        for name, part in mlp.named_parameters():
            part.copy_(learned[name])
    return Learned(before, after)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then half a cosine."""
    return min(1.0, (step + 1) / max(1.0, _WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _share(mlp: Any, parameters: dict[str, Tensor], rows: Sequence[Row]) -> float:
    """Error of rows held out, one at a time."""
    errors, energies = zip(*(map(float, _error(mlp, parameters, [row])) for row in rows), strict=True)
    return float(sum(errors) / (sum(energies) or 1.0))


def _error(mlp: Any, parameters: dict[str, Tensor], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Σ w ‖wanted − given‖² and Σ w ‖wanted‖²."""
    given, wanted, weights = (torch.cat(parts) for parts in zip(*rows, strict=True))
    found, wanted = functional_call(mlp, parameters, (given,)).float(), wanted.float()
    errors, energies = ((weights * part.square().sum(-1)).sum() for part in (found - wanted, wanted))
    return errors, energies
