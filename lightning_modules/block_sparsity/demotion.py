"""One iteration of progressive demotion: the lowest dense blocks to 2:4, then the lowest 2:4 blocks to top-k.

Before any falls to top-k, all 2:4 blocks, old and new, have scores of the weights they still have, by the present
criterion: a block that was demoted a moment ago competes with those demoted long before. Scores are computed in slabs
of rows, so the extra memory is a slab and one byte a weight for the mask, whatever the size of the matrix.

Shape legend: R, C rows and columns of a matrix; r, c rows and columns of blocks; b side of a block; n blocks chosen;
G groups that compete among themselves, N blocks of a group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.block_sparsity.tiers import DENSE, MID, TOPK, Tiers, pad, to_blocks

RowScores = Callable[[slice], Tensor]
"""Scores ``float32 [rows, C]`` of some rows of one matrix, not negative; higher is more important."""

Budget = Literal["matrix", "global", "band"]

_SLAB = {"cpu": 1 << 18}  # elements: a megabyte, which stays in a core's cache; a GPU wants fewer, larger launches
_GPU_SLAB = 1 << 22


@dataclass(frozen=True)
class Ratios:
    """Shares of the blocks in each tier; they sum to one."""

    dense: float
    mid_2_4: float
    topk: float

    def counts(self, blocks: int) -> tuple[int, int, int]:
        """Whole numbers of blocks: dense and top-k rounded, 2:4 the rest."""
        dense, topk = round(self.dense * blocks), round(self.topk * blocks)
        return dense, blocks - dense - topk, topk

    def sparsity(self, block: int, k: int) -> float:
        """Share of weights that are zero: m/2 + (1 − k/b²)·t."""
        return 0.5 * self.mid_2_4 + (1 - k / block**2) * self.topk


def demote(
    scores: Mapping[str, RowScores], tiers: Mapping[str, Tiers], target: Ratios, budget: Budget = "matrix"
) -> dict[str, Tensor]:
    """Bring every tier map to the target ratios, in place, strictly downwards.

    Args:
        scores: How to score each matrix.
        tiers: Its tier map; all-dense in the first iteration.
        target: Ratios after the iteration.
        budget: Who competes: the blocks of one matrix, of all matrices together ("global"), or of one row of blocks
            ("band", which gives every band equally many blocks of each tier).

    Returns:
        Mean score of the weights that every block still has, ``float32 [r, c]`` by matrix.

    Raises:
        ValueError: The target would bring a block back, or a score is not finite. The tier maps are left as they were.
    """
    flows = _flows(tiers, target, budget)
    means = {name: block_means(scores[name], tiers[name]) for name in tiers}
    for name, chosen_rc in _lowest_blocks(means, tiers, DENSE, flows, budget).items():
        _to_two_of_four(scores[name], tiers[name], chosen_rc, means[name])
    for name, chosen_rc in _lowest_blocks(means, tiers, MID, flows, budget).items():
        _to_topk(scores[name], tiers[name], chosen_rc, means[name])
    return means


def block_means(scores: RowScores, tiers: Tiers) -> Tensor:
    """Mean score of the weights that each block still has, ``float32 [r, c]``.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    sums = []
    for rows, bands in _slabs(tiers):
        weighted = scores(rows)
        if (tiers.map_rc[bands] != DENSE).any():
            weighted *= tiers.keep_RC[rows]
        padded = pad(weighted, tiers.block)
        # rows first: adding whole rows is what a processor does fastest
        columns = padded.unflatten(0, (-1, tiers.block)).sum(1)
        sums.append(columns.unflatten(1, (-1, tiers.block)).sum(2))
    means = torch.cat(sums) / tiers.kept_per_block()
    if not means.isfinite().all():
        raise ValueError(
            f"{tiers.name}: scores are not finite; the weights or the calibration statistics have NaN or Inf"
        )
    return means


def quantiles(means: Mapping[str, Tensor], tiers: Mapping[str, Tiers]) -> dict[str, list[float]]:
    """Minimum, quartiles and maximum of the block scores in each tier, over all matrices; empty for an empty tier."""
    found = {}
    for tier, label in ((DENSE, "dense"), (MID, "2:4"), (TOPK, "topk")):
        values = torch.cat([means[name][tiers[name].map_rc == tier].cpu() for name in tiers])
        # torch.quantile refuses more than 2^24 values, so take the order statistics
        places = [round(q * (len(values) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)]
        found[label] = values.sort().values[places].tolist() if len(values) else []
    return found


def _slabs(tiers: Tiers) -> Iterator[tuple[slice, slice]]:
    """Rows of the matrix and rows of blocks, some whole bands at a time."""
    rows, columns = tiers.shape
    bands = max(1, _SLAB.get(tiers.map_rc.device.type, _GPU_SLAB) // (columns * tiers.block))
    for first in range(0, len(tiers.map_rc), bands):
        last = min(first + bands, len(tiers.map_rc))
        yield slice(first * tiers.block, min(last * tiers.block, rows)), slice(first, last)


def _flows(tiers: Mapping[str, Tiers], target: Ratios, budget: Budget) -> dict[str, tuple[Tensor, Tensor]]:
    """Blocks that leave the dense tier and blocks that enter the top-k tier, by matrix, one number a group."""
    flows: dict[str, tuple[Tensor, Tensor]] = {}
    all_dense, all_topk, blocks = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64), 0
    for name, matrix in tiers.items():
        groups = matrix.map_rc if budget == "band" else matrix.map_rc.reshape(1, -1)
        dense, topk = (groups == DENSE).sum(1), (groups == TOPK).sum(1)
        want_dense, _, want_topk = target.counts(groups.shape[1])
        flows[name] = (dense - want_dense, want_topk - topk)
        all_dense, all_topk, blocks = (
            all_dense + dense.sum().cpu(),
            all_topk + topk.sum().cpu(),
            blocks + groups.numel(),
        )
    if budget == "global":
        want_dense, _, want_topk = target.counts(blocks)
        device = next(iter(tiers.values())).map_rc.device
        both = ((all_dense - want_dense).view(1).to(device), (want_topk - all_topk).view(1).to(device))
        flows = dict.fromkeys(tiers, both)
    for name, (from_dense, to_topk) in flows.items():
        if (from_dense < 0).any() or (to_topk < 0).any():
            have = "/".join(f"{count}" for count in tiers[name].counts())
            raise ValueError(
                f"{name} has {have} dense/2:4/top-k blocks; dense {target.dense:g}, mid_2_4 {target.mid_2_4:g}, topk "
                f"{target.topk:g} would un-demote some of them: demotion is one way, give lower dense and higher topk"
            )
    return flows


def _lowest_blocks(
    means: Mapping[str, Tensor],
    tiers: Mapping[str, Tiers],
    tier: int,
    flows: Mapping[str, tuple[Tensor, Tensor]],
    budget: Budget,
) -> dict[str, Tensor]:
    """The blocks of ``tier`` that leave it, bool ``[r, c]`` by matrix."""
    eligible = {name: matrix.map_rc == tier for name, matrix in tiers.items()}
    if budget == "global":
        count = next(iter(flows.values()))[tier]
        pooled = torch.cat([m.flatten() for m in means.values()])[None]
        chosen = lowest(pooled, torch.cat([e.flatten() for e in eligible.values()])[None], count)[0]
        parts = chosen.split([m.numel() for m in means.values()])
        return {name: part.view(means[name].shape) for name, part in zip(means, parts, strict=True)}
    found = {}
    for name, values_rc in means.items():
        shape = values_rc.shape if budget == "band" else (1, -1)
        picked = lowest(values_rc.reshape(shape), eligible[name].reshape(shape), flows[name][tier])
        found[name] = picked.view(values_rc.shape)
    return found


def lowest(values_GN: Tensor, eligible_GN: Tensor, count_G: Tensor) -> Tensor:
    """The ``count_G`` lowest eligible entries of every group, bool ``[G, N]``; of equals the first."""
    order_GN = values_GN.masked_fill(~eligible_GN, torch.inf).argsort(dim=1, stable=True)
    first_GN = torch.arange(values_GN.shape[1], device=values_GN.device)[None] < count_G[:, None]
    return torch.zeros_like(eligible_GN).scatter_(1, order_GN, first_GN)


def _chosen(scores: RowScores, tiers: Tiers, chosen_rc: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Index and scores ``[n, b, b]`` of the chosen blocks, a slab at a time; −1 where no weight is left to keep."""
    for rows, bands in _slabs(tiers):
        row, column = chosen_rc[bands].nonzero(as_tuple=True)
        if not len(row):
            continue
        index = (row + bands.start, column)
        blocks_nbb = to_blocks(pad(scores(rows), tiers.block), tiers.block)[row, column]
        yield index, blocks_nbb.masked_fill(~tiers.keep_rcbb[index], -1.0)


def _to_two_of_four(scores: RowScores, tiers: Tiers, chosen_rc: Tensor, means_rc: Tensor) -> None:
    """Keep the two best of every four neighbours in a row, of equals the first; the blocks' means follow."""
    for index, blocks_nbb in _chosen(scores, tiers, chosen_rc):
        a, b, c, d = blocks_nbb.unflatten(-1, (-1, 4)).unbind(-1)
        # five comparisons and their opposites: each weight is kept if it loses to at most one of the other three
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        keep = torch.stack([_two(ab, ac, ad), _two(~ab, bc, bd), _two(~ac, ~bc, cd), _two(~ad, ~bd, ~cd)], -1)
        _demote(tiers, index, MID, keep.flatten(-2), blocks_nbb, means_rc)


def _two(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Whether at least two of three hold."""
    return (x & y) | (z & (x | y))


def _to_topk(scores: RowScores, tiers: Tiers, chosen_rc: Tensor, means_rc: Tensor) -> None:
    """Keep the k best weights of each block among those it still has; the blocks' means follow."""
    for index, blocks_nbb in _chosen(scores, tiers, chosen_rc):
        flat = blocks_nbb.flatten(1)
        best = flat.topk(tiers.k, sorted=False).indices
        keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True)
        _demote(tiers, index, TOPK, keep.view_as(blocks_nbb), blocks_nbb, means_rc)


def _demote(
    tiers: Tiers, index: tuple[Tensor, Tensor], tier: int, keep_nbb: Tensor, blocks_nbb: Tensor, means_rc: Tensor
) -> None:
    keep_nbb = keep_nbb & (blocks_nbb >= 0)
    tiers.demote(index, tier, keep_nbb)
    means_rc[index] = (blocks_nbb * keep_nbb).sum((1, 2)) / keep_nbb.sum((1, 2))
