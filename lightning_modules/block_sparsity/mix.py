"""Which mix of dense, 2:4 and top-k blocks loses least in so many bytes, and how many weights top-k blocks then keep.

What a demotion loses is the sum of the squared scores of the weights that go: with OBS saliencies the squared error of
the matrix's outputs that is left when the others make up for it. Errors of different outputs are not equally bad, so
each row counts by how much the model's loss minds it (``sensitivity``): then all matrices compare. Every block takes
the tier with the least loss + price · bits; one price for all, or one for each matrix, is where the bits are those
asked for.

Shape legend: b side of a block; n blocks; K numbers of weights that are tried for top-k blocks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lightning_modules.block_sparsity.demotion import Ratios
from lightning_modules.block_sparsity.masks import best_of_groups
from lightning_modules.block_sparsity.pruner import packed_bits, padding
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.tiers import DENSE, MID, TOPK, TierMap, most_topk, pad, to_blocks

TRIED = (1 / 24, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16)
"""Shares of a block's weights that a top-k block may keep, where that is to be chosen."""


@dataclass(frozen=True)
class Mix:
    """A target of bytes.

    Args:
        bits: Bits per weight of the pruned matrices in the packed file.
        among: Who shares them: every matrix for itself ("matrix", "band"), or all ("global").
        ks: What top-k blocks may keep, to choose from; nothing where that is settled. Blocks then become top-k only
            where 2:4 blocks alone are not small enough: errors as large as theirs do more than their squares say.
        values: Type of the tiers' values in that file.
        bands: Whether it is in the band form.
    """

    bits: float
    among: str = "matrix"
    ks: tuple[int, ...] = ()
    values: str = "float16"
    bands: bool = False

    def size(self, ratios: Ratios, block: int, k: int) -> float:
        """Bits per weight that shares of the tiers take in the file."""
        return packed_bits(ratios, block, k, self.values, self.bands)


@dataclass(frozen=True)
class Found:
    """A mix.

    Attributes:
        k: Weights that top-k blocks keep.
        maps: Each matrix's tier map, uint8 ``[r, c]``, on the CPU.
        loss: What it loses of all squared scores.
        bits: Bits per weight in the packed file.
    """

    k: int
    maps: dict[str, Tensor]
    loss: float
    bits: float


def in_bands(map_rc: Tensor, bits: Callable[[Ratios], float]) -> Ratios:
    """The shares that all rows of blocks can have alike, next to a map's and in no more bits.

    Args:
        map_rc: A tier map.
        bits: What shares take.
    """
    columns = map_rc.shape[1]

    def shares(dense: int, topk: int) -> Ratios:
        return Ratios(dense / columns, (columns - dense - topk) / columns, topk / columns)

    wanted = Ratios(*(float((map_rc == tier).float().mean()) for tier in (DENSE, MID, TOPK)))
    places = [{math.floor(n + 1e-4), math.ceil(n - 1e-4)} for n in (wanted.dense * columns, wanted.topk * columns)]
    near = [shares(dense, topk) for dense, topk in product(*places) if dense + topk <= columns]
    return max((one for one in near if bits(one) <= bits(wanted) + 1e-3), key=bits)  # dense down and top-k up is one


def choices(block: int, values: str = "float16") -> tuple[int, ...]:
    """What is tried for k, where values are packed as a type."""
    most = min(most_topk(block, values), most_topk(block))
    return tuple(sorted({min(max(1, round(share * block * block)), most) for share in TRIED}))


def best_mix(scores: Mapping[str, Scored], tiers: Mapping[str, TierMap], target: Mix, ks: Sequence[int]) -> Found:
    """The mix that loses least within the bits, from the tiers that blocks are in now and downwards only.

    Args:
        scores: How each matrix is scored.
        tiers: Its tier map.
        target: What is asked for.
        ks: What top-k blocks may keep, ascending; one for all.

    Raises:
        ValueError: No mix is as small as that, or the blocks are smaller already; a score is not finite.
    """
    block = next(iter(tiers.values())).block
    losses, whole = {}, 0.0
    for name in tiers:
        losses[name], mine = block_losses(scores[name], tiers[name], ks)
        whole += mine
    found: list[Found] = []
    for place, k in enumerate(ks):
        if found and target.size(Ratios(0, 0, 1), block, k) > target.bits:
            break  # no mix with this one, nor with a larger one, is that small
        alone = [target.size(ratios, block, k) for ratios in (Ratios(1, 0, 0), Ratios(0, 1, 0), Ratios(0, 0, 1))]
        groups = [list(losses)] if target.among == "global" else [[name] for name in losses]
        maps: dict[str, Tensor] = {}
        loss, spent = 0.0, 0.0
        for names in groups:
            together = torch.cat([losses[name][:, [DENSE, MID, TOPK + place]] for name in names]).double()
            bits = padding([tiers[name] for name in names]) * torch.tensor(alone, dtype=torch.float64)
            if target.ks and target.bits >= float(bits[MID]):
                together[together[:, MID].isfinite(), TOPK] = torch.inf
            whose = "all matrices" if target.among == "global" else names[0]
            tier_n = _cheapest(together, bits, target.bits, whose)
            loss += float(together.gather(1, tier_n[:, None]).sum())
            spent += float(bits[tier_n].mean()) * sum(math.prod(tiers[name].shape) for name in names)
            for name, mine in zip(names, tier_n.split([len(losses[name]) for name in names]), strict=True):
                maps[name] = mine.to(torch.uint8).view(tiers[name].map_rc.shape)
        weights = sum(math.prod(one.shape) for one in tiers.values())
        found.append(Found(k, maps, loss / max(whole, torch.finfo(torch.float32).tiny), spent / weights))
    return min(found, key=lambda one: one.loss)


def block_losses(scores: Scored, tiers: TierMap, ks: Sequence[int]) -> tuple[Tensor, float]:
    """What each block loses in each tier, float32 ``[n, 2 + K]`` on the CPU: dense, 2:4, top-k with each k.

    Infinite where a block is below that tier already. And what all of them have now.
    """
    parts = []
    for rows, scores_bRC in _bands(scores, tiers):
        kept = tiers.keep_RC[rows]
        squares = scores_bRC.square_().masked_fill_(~kept, 0.0)
        best = best_of_groups(squares, 2, 4) & kept
        blocks, halves = (_as_blocks(part, tiers.block) for part in (squares, squares * best))
        whole = blocks.sum(1)
        left = [halves.sum(1)] + [halves.topk(k, 1).values.sum(1) for k in ks]
        parts.append(torch.stack([torch.zeros_like(whole), *(whole - part for part in left), whole], 1).cpu())
    found = torch.cat(parts)
    if not found.isfinite().all():
        raise ValueError(f"{tiers.name}: scores are not finite")
    now = tiers.map_rc.flatten().cpu()
    losses = found[:, :-1].clamp_min(0)
    losses[now != DENSE, DENSE] = torch.inf
    losses[now == TOPK, MID] = torch.inf
    losses[now == TOPK, TOPK:] = 0.0
    return losses, float(found[:, -1].sum(dtype=torch.float64))


def _bands(scores: Scored, tiers: TierMap) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, tiers.shape[0], 4 * tiers.block):
        rows = slice(first, min(first + 4 * tiers.block, tiers.shape[0]))
        yield rows, scores.rows(rows)


def _as_blocks(matrix: Tensor, block: int) -> Tensor:
    return to_blocks(pad(matrix, block), block).flatten(0, 1).flatten(1)


def _cheapest(losses_n3: Tensor, bits_3: Tensor, target: float, whose: str) -> Tensor:
    """Each block's tier, int64 ``[n]``, so that the mean of the bits is at most the target and as near as can be.

    Args:
        losses_n3: What each block loses in each tier; infinite where it cannot be in it.
        bits_3: Bits per weight of each tier.
        target: The target.
        whose: Whose blocks they are, for the message.

    Raises:
        ValueError: It cannot be.
    """
    possible = losses_n3.isfinite()
    lowest = bits_3.masked_fill(~possible, torch.inf).amin(1).mean()
    highest = bits_3.masked_fill(~possible, -torch.inf).amax(1).mean()
    if not float(lowest) <= target + 1e-6:
        raise ValueError(
            f"target_bits: no mix of tiers of {whose} takes only {target:g} bits per weight: {float(lowest):.3f} is "
            "the least"
        )
    if float(highest) <= target:
        return bits_3.masked_fill(~possible, -torch.inf).argmax(1)
    low, high = 0.0, 1.0
    while _mean_bits(losses_n3, bits_3, high) > target and high < 1e30:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_bits(losses_n3, bits_3, middle) > target else (low, middle)
    return (losses_n3 + high * bits_3).argmin(1)


def _mean_bits(losses_n3: Tensor, bits_3: Tensor, price: float) -> float:
    return float(bits_3[(losses_n3 + price * bits_3).argmin(1)].mean())
