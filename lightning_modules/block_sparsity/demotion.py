"""One iteration of progressive demotion: the lowest dense blocks to 2:4, then the lowest 2:4 blocks to top-k.

Before any falls to top-k, all 2:4 blocks, old and new, have scores of the weights they still have, by the present
criterion: a block that was demoted a moment ago competes with those demoted long before. All scores are computed once,
in slabs of rows, for the means of blocks; then once more only those of the blocks that fall. So the extra memory is a
slab, whatever the size of the matrix.

Shape legend: R, C rows and columns of a matrix; r, c rows and columns of blocks; b side of a block; n blocks chosen;
G groups that compete among themselves, N blocks of a group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.block_sparsity.masks import largest, lowest
from lightning_modules.block_sparsity.scored import NOT_FINITE, Scored, slab_elements
from lightning_modules.block_sparsity.tiers import DENSE, MID, TOPK, Index, TierMap, pad

Scope = Literal["matrix", "global", "band"]


@dataclass(frozen=True)
class Ratios:
    """Shares of the blocks in each tier; they sum to one."""

    dense: float
    mid_2_4: float
    topk: float

    def counts(self, blocks: int) -> tuple[int, int, int]:
        """Whole numbers of blocks: dense and top-k rounded, 2:4 the rest; top-k gets what dense leaves."""
        dense = round(self.dense * blocks)
        topk = min(round(self.topk * blocks), blocks - dense)
        return dense, blocks - dense - topk, topk

    def sparsity(self, block: int, k: int) -> float:
        """Share of weights that are zero: m/2 + (1 − k/b²)·t."""
        return 0.5 * self.mid_2_4 + (1 - k / block**2) * self.topk


def demote(
    scores: Mapping[str, Scored], tiers: Mapping[str, TierMap], target: Ratios, scope: Scope = "matrix"
) -> dict[str, Tensor]:
    """Bring every tier map to the target ratios, in place, strictly downwards.

    Args:
        scores: How to score each matrix.
        tiers: Its tier map; all-dense in the first iteration.
        target: Ratios after the iteration.
        scope: Who competes: the blocks of one matrix, of all matrices together ("global"), or of one row of blocks
            ("band", which gives every band equally many blocks of each tier).

    Returns:
        Mean score of the weights that every block still has, ``float32 [r, c]`` by matrix.

    Raises:
        ValueError: The target would bring a block back, or a score is not finite. The tier maps are left as they were.
    """
    moving = flows(tiers, target, scope)
    sums = {name: block_sums(scores[name], tiers[name]) for name in tiers}
    for tier, cut in ((DENSE, _to_two_of_four), (MID, _to_topk)):
        for name, chosen_rc in _lowest_blocks(_means(sums, tiers), tiers, tier, moving, scope).items():
            cut(scores[name], tiers[name], chosen_rc, sums[name])
    return _means(sums, tiers)


def demote_to(scores: Scored, tiers: TierMap, wanted_rc: Tensor) -> Tensor:
    """Bring every block of one matrix to the tier that a map says, in place, strictly downwards.

    Args:
        scores: How to score the matrix.
        tiers: Its tier map.
        wanted_rc: The tier of each block.

    Returns:
        See ``demote``, of the one matrix.

    Raises:
        ValueError: The map would bring a block back, or a score is not finite. The tier map is left as it was.
    """
    wanted_rc = wanted_rc.to(tiers.map_rc)
    if (wanted_rc < tiers.map_rc).any():
        raise ValueError(f"{tiers.name}: the tiers that were found would un-demote some blocks: demotion is one way")
    sums_rc = block_sums(scores, tiers)
    _to_two_of_four(scores, tiers, (tiers.map_rc == DENSE) & (wanted_rc > DENSE), sums_rc)
    _to_topk(scores, tiers, (tiers.map_rc == MID) & (wanted_rc == TOPK), sums_rc)
    return sums_rc / tiers.kept_per_block()


def block_sums(scores: Scored, tiers: TierMap) -> Tensor:
    """Sum of the scores of the weights that each block still has, ``float32 [r, c]``.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    # small results kept between large temporaries would scatter these over the heap: fresh pages for each slab
    sums_rc = torch.empty(tiers.map_rc.shape, device=tiers.map_rc.device)
    thinned = (tiers.map_rc != DENSE).any(1).tolist()
    for rows, bands in _slabs(tiers):
        weighted = scores.rows(rows)
        if any(thinned[bands]):
            # through bytes: on a CPU booleans take five times as long to become floats
            weighted *= tiers.keep_RC[rows].view(torch.uint8).float()
        padded = pad(weighted, tiers.block)
        # rows first: adding whole rows is what a processor does fastest
        columns = padded.unflatten(0, (-1, tiers.block)).sum(1)
        sums_rc[bands] = columns.unflatten(1, (-1, tiers.block)).sum(2)
    if not sums_rc.isfinite().all():
        raise ValueError(f"{tiers.name}: {NOT_FINITE}")
    return sums_rc


def _means(sums: Mapping[str, Tensor], tiers: Mapping[str, TierMap]) -> dict[str, Tensor]:
    return {name: sums_rc / tiers[name].kept_per_block() for name, sums_rc in sums.items()}


def quantiles(means: Mapping[str, Tensor], tiers: Mapping[str, TierMap]) -> dict[str, list[float]]:
    """Minimum, quartiles and maximum of the block scores in each tier, over all matrices; empty for an empty tier."""
    found = {}
    for tier, label in ((DENSE, "dense"), (MID, "2:4"), (TOPK, "topk")):
        values = torch.cat([means[name][tiers[name].map_rc == tier].cpu() for name in tiers])
        # torch.quantile refuses more than 2^24 values, so take the order statistics
        places = [round(q * (len(values) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)]
        found[label] = values.sort().values[places].tolist() if len(values) else []
    return found


def _slabs(tiers: TierMap) -> Iterator[tuple[slice, slice]]:
    """Rows of the matrix and rows of blocks, some whole bands at a time."""
    rows, columns = tiers.shape
    bands = max(1, slab_elements(tiers.map_rc.device) // (columns * tiers.block))
    for first in range(0, len(tiers.map_rc), bands):
        last = min(first + bands, len(tiers.map_rc))
        yield slice(first * tiers.block, min(last * tiers.block, rows)), slice(first, last)


def flows(tiers: Mapping[str, TierMap], target: Ratios, scope: Scope) -> dict[str, tuple[Tensor, Tensor]]:
    """Blocks that leave the dense tier and blocks that enter the top-k tier, by matrix, one number a group.

    Raises:
        ValueError: The target would bring a block back.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    all_dense = torch.zeros((), dtype=torch.int64)
    all_topk = torch.zeros((), dtype=torch.int64)
    blocks = 0
    for name, matrix in tiers.items():
        groups = matrix.map_rc if scope == "band" else matrix.map_rc.reshape(1, -1)
        dense, topk = (groups == DENSE).sum(1), (groups == TOPK).sum(1)
        want_dense, _, want_topk = target.counts(groups.shape[1])
        found[name] = (dense - want_dense, want_topk - topk)
        all_dense += dense.sum().cpu()
        all_topk += topk.sum().cpu()
        blocks += groups.numel()
    if scope == "global":
        want_dense, _, want_topk = target.counts(blocks)
        device = next(iter(tiers.values())).map_rc.device
        both = ((all_dense - want_dense).view(1).to(device), (want_topk - all_topk).view(1).to(device))
        found = dict.fromkeys(tiers, both)
    for name, (from_dense, to_topk) in found.items():
        if (from_dense < 0).any() or (to_topk < 0).any():
            have = "/".join(f"{count}" for count in tiers[name].counts())
            raise ValueError(
                f"{name} has {have} dense/2:4/top-k blocks; dense {target.dense:g}, mid_2_4 {target.mid_2_4:g}, topk "
                f"{target.topk:g} would un-demote some of them: demotion is one way, give lower dense and higher topk"
            )
    return found


def _lowest_blocks(
    means: Mapping[str, Tensor],
    tiers: Mapping[str, TierMap],
    tier: int,
    flows: Mapping[str, tuple[Tensor, Tensor]],
    scope: Scope,
) -> dict[str, Tensor]:
    """The blocks of ``tier`` that leave it, bool ``[r, c]`` by matrix."""
    eligible = {name: matrix.map_rc == tier for name, matrix in tiers.items()}
    if scope == "global":
        count = next(iter(flows.values()))[tier]
        pooled = torch.cat([m.flatten() for m in means.values()])[None]
        chosen = lowest(pooled, torch.cat([e.flatten() for e in eligible.values()])[None], count)[0]
        parts = chosen.split([m.numel() for m in means.values()])
        return {name: part.view(means[name].shape) for name, part in zip(means, parts, strict=True)}
    found = {}
    for name, values_rc in means.items():
        shape = values_rc.shape if scope == "band" else (1, -1)
        picked = lowest(values_rc.reshape(shape), eligible[name].reshape(shape), flows[name][tier])
        found[name] = picked.view(values_rc.shape)
    return found


def _to_two_of_four(scores: Scored, tiers: TierMap, chosen_rc: Tensor, sums_rc: Tensor) -> None:
    """Keep the two best of every four neighbours in a row, of equals the first; the blocks' sums follow."""
    for index, scores_nbb in scores.blocks(_index(chosen_rc), tiers.block):
        a, b, c, d = scores_nbb.unflatten(-1, (-1, 4)).unbind(-1)
        # six comparisons and their opposites: each weight is kept if it loses to at most one of the other three. What
        # lies beyond the edge comes last in its group with score zero, so it beats nothing that exists
        ab, ac, ad = a >= b, a >= c, a >= d
        bc, bd, cd = b >= c, b >= d, c >= d
        keep = torch.stack([_two(ab, ac, ad), _two(~ab, bc, bd), _two(~ac, ~bc, cd), _two(~ad, ~bd, ~cd)], -1)
        keep_nbb = tiers.demote(index, MID, keep.flatten(-2))
        sums_rc[index] = scores_nbb.mul_(keep_nbb.view(torch.uint8).float()).flatten(1).sum(1)


def _index(chosen_rc: Tensor) -> Index:
    row, column = chosen_rc.nonzero(as_tuple=True)
    return row, column


def _two(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Whether at least two of three hold."""
    return (x & y) | (z & (x | y))


def _to_topk(scores: Scored, tiers: TierMap, chosen_rc: Tensor, sums_rc: Tensor) -> None:
    """Keep the k best weights of each block among those it still has, of equals the first; the blocks' sums follow."""
    k = tiers.k
    for index, scores_nbb in scores.blocks(_index(chosen_rc), tiers.block):
        kept = tiers.kept(index).view(torch.uint8).float().flatten(1)
        flat = scores_nbb.flatten(1).mul_(kept).add_(kept.sub_(1))  # −1 where no weight is left to keep
        best = largest(flat, k).clamp_min_(0)
        keep = flat >= best[:, :1]
        tied = (keep.sum(1, dtype=torch.int32) > k).nonzero(as_tuple=True)[0]
        if len(tied):
            keep[tied] = lowest(-flat[tied], flat[tied] >= 0, torch.full_like(tied, k))
        tiers.demote(index, TOPK, keep.view_as(scores_nbb))
        sums_rc[index] = best.sum(1)
