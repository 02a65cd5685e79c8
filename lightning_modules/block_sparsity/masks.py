"""Holding masks while weights change, and counting where they did not hold."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.sharded import local


@torch.no_grad()
def mask_weights(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to zero.

    Args:
        matrices: Linear layers by name.
        keep: bool ``[R, C]`` of each, True where the weight stays; of matrices that are cut up over ranks, see
            ``sharded.cut_masks``.
    """
    for name, mask in keep.items():
        local(matrices[name].weight).masked_fill_(~mask, 0.0)


@torch.no_grad()
def mask_gradients(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> None:
    """Set the gradient of every pruned weight to zero, so that clipping and moments see only the rest."""
    for name, mask in keep.items():
        gradient = matrices[name].weight.grad
        if gradient is not None:
            local(gradient).masked_fill_(~mask, 0.0)


@torch.no_grad()
def violations(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> int:
    """Pruned weights that are not zero (NaN included), of those that this rank has; one wait for the device."""
    if not keep:
        return 0
    counts = [((local(matrices[name].weight) != 0) & ~mask).sum() for name, mask in keep.items()]
    return int(torch.stack(counts).sum())


def refuse(found: int, when: str) -> int:
    """Violations, 0.

    Raises:
        RuntimeError: There are some, with their number.
    """
    if found:
        raise RuntimeError(f"{found} pruned weights are not zero {when}")
    return found


def unstructured(scores: Scored, sparsity: float, keep_RC: Tensor) -> Tensor:
    """Mask that drops the lowest weights of every row, bool ``[R, C]``; of equals the first are dropped.

    The comparison inside a row is that of Wanda (arXiv 2306.11695, §3). Weights already pruned stay pruned: where a row
    has more zeros, because an update chose among several rows, the others lose that much less.

    Args:
        scores: Scores, not negative.
        sparsity: Share of every row that is zero afterwards; of all rows together where some have more already.
        keep_RC: The mask so far.

    Raises:
        ValueError: Fewer weights are left than ``sparsity`` allows, or a score is not finite.
    """
    count, columns = keep_RC.shape
    zeros_R = (~keep_RC).sum(1)
    if zeros_R.sum() > count * math.ceil(sparsity * columns - 1e-9):
        raise ValueError(f"there are more zeros than sparsity {sparsity:g} asks for: pruned weights do not come back")
    drop_R = _levelled(zeros_R, count * round(sparsity * columns))
    found = torch.empty_like(keep_RC)
    for rows, scores_rC in scores.slabs():
        here = scores_rC.masked_fill_(~keep_RC[rows], -1.0)
        found[rows] = ~lowest(here, torch.ones_like(keep_RC[rows]), drop_R[rows])
    return found


def _levelled(zeros_R: Tensor, total: int) -> Tensor:
    """So many zeros for every row: at least what it has, and otherwise alike, so that all have the total."""
    low, high = 0, total // len(zeros_R) + 1
    while high - low > 1:  # the highest level that does not need too many
        level = (low + high) // 2
        low, high = (level, high) if int(zeros_R.clamp_min(level).sum()) <= total else (low, level)
    found = zeros_R.clamp_min(low)
    below = (found == low).nonzero().flatten()[: max(0, total - int(found.sum()))]
    found[below] += 1
    return found


def groups(scores: Scored, kept: int, of: int, keep_RC: Tensor) -> Tensor:
    """Mask with so many weights of every group of neighbours in a row, bool ``[R, C]``; of equals the first stay.

    Args:
        scores: Scores, not negative.
        kept: How many stay: 2 of 4, 4 of 8.
        of: Size of a group; the last of a row may be smaller.
        keep_RC: The mask so far; what it has not does not come back.

    Raises:
        ValueError: A score is not finite.
    """
    found = torch.empty_like(keep_RC)
    for rows, scores_rC in scores.slabs():
        found[rows] = best_of_groups(scores_rC.masked_fill_(~keep_RC[rows], -1.0), kept, of) & keep_RC[rows]
    return found


def best_of_groups(scores_RC: Tensor, kept: int, of: int) -> Tensor:
    """The ``kept`` highest of every ``of`` neighbours in a row, bool; of equals the first.

    The last group of a row may be smaller.
    """
    columns = scores_RC.shape[1]
    padded = torch.nn.functional.pad(scores_RC, (0, -columns % of), value=-torch.inf)
    return torch.stack(best_of(padded.unflatten(1, (-1, of)).unbind(-1), kept), -1).flatten(1)[:, :columns]


def best_of(members: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Which of several tensors' entries are among the ``kept`` highest at their place, bool; of equals the first."""
    beaten_by = [torch.zeros_like(members[0], dtype=torch.int8) for _ in members]  # how many are better
    for i, first in enumerate(members):
        for j in range(i + 1, len(members)):
            wins = first >= members[j]
            beaten_by[j] += wins
            beaten_by[i] += ~wins
    return [beaten < kept for beaten in beaten_by]


def lowest(values_GN: Tensor, eligible_GN: Tensor, count_G: Tensor) -> Tensor:
    """The ``count_G`` lowest eligible entries of every group, bool ``[G, N]``; of equals the first."""
    most = int(count_G.max())
    if not most:
        return torch.zeros_like(eligible_GN)
    values_GN = values_GN.masked_fill(~eligible_GN, torch.inf)
    if int(count_G.min()) == most:
        limit_G1 = _smallest(values_GN, most)
    else:
        smallest = values_GN.topk(most, dim=1, largest=False).values
        limit_G1 = smallest.gather(1, (count_G - 1).clamp_min(0)[:, None])
    chosen_GN = values_GN <= limit_G1
    tied = (chosen_GN.sum(1, dtype=torch.int32) > count_G).nonzero(as_tuple=True)[0]
    if len(tied):
        below_GN, equal_GN = values_GN[tied] < limit_G1[tied], values_GN[tied] == limit_G1[tied]
        room_G1 = count_G[tied, None] - below_GN.sum(1, keepdim=True)
        chosen_GN[tied] = below_GN | (equal_GN & (equal_GN.cumsum(1) <= room_G1))
    return chosen_GN


def _smallest(values_GN: Tensor, count: int) -> Tensor:
    """The ``count``-th smallest of every row, ``[G, 1]``."""
    if values_GN.device.type == "cpu":
        return torch.from_numpy(np.partition(values_GN.numpy(), count - 1, axis=1)[:, count - 1 : count])
    return values_GN.kthvalue(count, dim=1, keepdim=True).values


def largest(values_nN: Tensor, count: int) -> Tensor:
    """The ``count`` largest of every row, the least of them first."""
    if values_nN.device.type == "cpu":
        # NumPy selects with vector instructions: a quarter of the time that torch.topk takes
        return torch.from_numpy(np.partition(values_nN.numpy(), -count, axis=1)[:, -count:])
    return values_nN.topk(count, dim=1).values.flip(1)
