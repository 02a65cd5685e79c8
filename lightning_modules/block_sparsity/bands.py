"""The packed form in bands: what a product with packed weights wants to read. The same bytes in another order.

A band is a row of blocks. All bands have equally many blocks of each tier (the scope "band" sees to that): they are
equal work and need no pointers. A band's blocks are sorted by tier, then by column, so that its values are read one
after the other and only the input is gathered. Of r bands with D dense, M 2:4 and T top-k blocks each, of side b:

* ``columns`` int16 [r, D + M + T]: the block columns of the dense blocks, of the 2:4 and of the top-k, each ascending;
  it replaces the map
* ``dense`` [r, D, b, b]
* ``mid`` [r, 2, M, b·b/4]: the first values of all groups of four, then the second ones; ``mid_index`` uint8
  [r, M, b·b/8]: byte i of a block has group i in its low half, as ``first | second << 2``, and group i + b·b/8 in the
  high one
* ``topk``, ``topk_index`` [r, T, k]

and for int8 values the scales, by blocks as in ``packing``.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.block_sparsity.packing import (
    Layout,
    check_places,
    check_tensors,
    pack_map,
    part_types,
    unpack,
    unpack_map,
)
from lightning_modules.block_sparsity.scored import slab_elements
from lightning_modules.block_sparsity.tiers import NAMES, check_sizes

Parts = dict[str, Tensor]


def to_bands(parts: Parts, layout: Layout, name: str) -> Parts:
    """The band form of what ``packing.pack`` gave.

    Args:
        parts: Packed tensors in the order of blocks.
        layout: The matrix's sizes.
        name: Its name, for messages.

    Raises:
        ValueError: The bands have different numbers of blocks of some tier, or more columns than 16 bits count.
    """
    map_rc = unpack_map(parts["map"], layout)
    bands, across = map_rc.shape
    counts = [(map_rc == tier).sum(1) for tier in range(len(NAMES))]
    for tier, count in zip(NAMES, counts, strict=True):
        if count.min() != count.max():
            raise ValueError(
                f"{name}: its bands of {layout.block} rows have {int(count.min())} to {int(count.max())} {tier} "
                "blocks; the band form needs equally many in each: prune with scope band"
            )
    if across > torch.iinfo(torch.int16).max:
        raise ValueError(f"{name}: the band form counts block columns in 16 bits, {across} are too many")
    by_band = {part: _split(value, bands) for part, value in parts.items() if part != "map"}
    halves = by_band["mid_index"]
    groups = torch.stack([halves & 15, halves >> 4], -1).flatten(2)
    low, high = groups.chunk(2, -1)
    return by_band | {
        "columns": map_rc.argsort(dim=1, stable=True).to(torch.int16),
        "mid": by_band["mid"].unflatten(-1, (-1, 2)).flatten(2, 3).permute(0, 3, 1, 2).contiguous(),
        "mid_index": low | high << 4,
    }


def check_bands(parts: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> None:
    """Refuse tensors that are not what ``to_bands`` gives for a matrix of this layout with values of this type.

    Raises:
        ValueError: Naming the part that is missing, of another shape or type, or has places that there are not.
    """
    check_sizes(layout.block, layout.k)
    bands, across = layout.map_shape
    check_tensors(parts, {"columns": ((bands, across), torch.int16)})
    if not torch.equal(parts["columns"].sort(1).values, torch.arange(across, dtype=torch.int16).expand(bands, across)):
        raise ValueError("columns does not name every column of blocks once in every band")
    b = layout.block
    dense, mid, topk = (_count(parts, part) for part in ("dense", "mid_index", "topk"))
    if dense + mid + topk != across:
        raise ValueError(f"a band has {dense} + {mid} + {topk} blocks where {across} are due")
    shapes: dict[str, tuple[int, ...]] = {"dense": (bands, dense, b, b), "mid": (bands, 2, mid, b * b // 4)}
    shapes |= {"mid_index": (bands, mid, b * b // 8)}
    shapes |= {"topk": (bands, topk, layout.k), "topk_index": (bands, topk, layout.k)}
    types = part_types(shapes, layout, dtype)
    if dtype == torch.int8:  # scales are by rows of blocks, also where values are in planes
        types["mid.scale"] = ((bands, mid, b, 1), torch.float16)
    check_tensors(parts, types)
    check_places(parts, b)


def _count(parts: Mapping[str, Tensor], part: str) -> int:
    tensor = parts.get(part)
    if tensor is None or tensor.ndim < 2:
        raise ValueError(f"{part} is missing or has no blocks")
    return tensor.shape[1]


def from_bands(parts: Parts, layout: Layout) -> Parts:
    """Inverse of ``to_bands``."""
    columns = parts["columns"].long()
    b = layout.block
    counts = [parts[part].shape[1] for part in ("dense", "mid_index", "topk")]
    tiers = torch.arange(3, dtype=torch.uint8, device=columns.device).repeat_interleave(
        torch.tensor(counts).to(columns)
    )
    map_rc = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device).scatter_(
        1, columns, tiers.expand_as(columns)
    )
    groups = torch.cat([parts["mid_index"] & 15, parts["mid_index"] >> 4], -1)
    by_band = {part: value for part, value in parts.items() if part != "columns"} | {
        "mid": parts["mid"].permute(0, 2, 3, 1).reshape(len(columns), -1, b, b // 2),
        "mid_index": groups[..., 0::2] | groups[..., 1::2] << 4,
    }
    return {"map": pack_map(map_rc)} | {part: value.flatten(0, 1) for part, value in by_band.items()}


def band_product(x: Tensor, parts: Parts, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias, ``[…, C]`` to ``[…, R]``, in the type of ``x``: some bands are expanded at a time, and forgotten."""
    bands, b = len(parts["columns"]), layout.block
    count = max(1, slab_elements(x.device) // (b * layout.columns))
    found = []
    for first in range(0, bands, count):
        some = {part: value[first : first + count] for part, value in parts.items()}
        rows = min(layout.rows - first * b, count * b)
        here = Layout(rows, layout.columns, b, layout.k)
        share = None if bias is None else bias[first * b :][:rows]
        found.append(F.linear(x, unpack(from_bands(some, here), here, x.dtype), share))
    return torch.cat(found, -1)


def _split(value: Tensor, bands: int) -> Tensor:
    return value.unflatten(0, (bands, -1)) if len(value) else value.new_empty(bands, *value.shape)
