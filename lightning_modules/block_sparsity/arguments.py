"""What arguments of a run must be, before any work."""

import math
from collections.abc import Mapping
from typing import Literal

from lightning_modules.block_sparsity.demotion import Ratios, Scope
from lightning_modules.block_sparsity.mix import choices
from lightning_modules.block_sparsity.pruner import Pattern, packed_bits
from lightning_modules.block_sparsity.tiers import check_sizes, most_topk

_TOPK = 10  # of 256, as the original has it


def check_mix(
    block: int,
    topk: int | Literal["auto"] | None,
    target_bits: float | None,
    pattern: Pattern,
    scope: Scope,
    values: str,
    bands: bool,
) -> int:
    """Weights that a top-k block keeps, as long as nothing else has been chosen.

    Args:
        block: Side of a block.
        topk: What was asked for.
        target_bits: Bits per weight, where a mix of tiers is to be found.
        pattern: See ``Pruner``.
        scope: See ``Pruner``.
        values: Type of packed values.
        bands: Whether the band form is what is packed.

    Raises:
        ValueError: They do not go together, or no mix takes so many bits.
    """
    # maps are of no type: what any has is exported in another, too
    k = topk if isinstance(topk, int) else min(_TOPK, most_topk(block, values), most_topk(block))
    for form in ("float16", values):
        check_sizes(block, k, form)
    if topk == "auto" and target_bits is None:
        raise ValueError("topk auto needs target_bits: it is chosen with the mix of tiers")
    if target_bits is None:
        return k
    smallest = choices(block, values)[0] if topk == "auto" else k
    most = packed_bits(Ratios(1, 0, 0), block, k, values, bands)
    least = packed_bits(Ratios(0, 0, 1), block, smallest, values, bands)
    if not least <= target_bits <= most:
        raise ValueError(
            f"target_bits must be between {least:.3f} (top-k blocks of {smallest} weights only) and {most:.3f} "
            f"(dense), got {target_bits}"
        )
    if bands and scope != "band":
        raise ValueError(f"target_bits with export_bands needs scope band, got {scope}")
    if pattern != "tiers":
        raise ValueError(f"target_bits is for a mix of tiers; pattern {pattern} has none")
    return k


def check_numbers(
    whole: Mapping[str, tuple[int, int]], rates: Mapping[str, float], shares: Mapping[str, float]
) -> None:
    """Refuse numbers out of their range.

    Args:
        whole: Whole numbers by argument, each with the least that it may be.
        rates: Numbers that must be above zero.
        shares: Numbers that must lie between 0 and 1.

    Raises:
        ValueError: Naming the first.
    """
    for name, (value, least) in whole.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, rate in rates.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be above 0, got {rate}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {share}")
