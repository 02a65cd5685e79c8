"""Blocks of three tiers as the few bytes they need: values and indices; and back, bit for bit.

Of a matrix with D dense, M 2:4 and T top-k blocks of side b, in row-major order of blocks:

* ``map`` uint8: two bits a block, four blocks a byte
* ``dense`` [D, b, b]: values
* ``mid`` [M, b, b/2]: the two values of each group of four; ``mid_index`` uint8 [M, b·b/8]: two bits for each, the
  group's first index lowest, two groups a byte
* ``topk`` [T, k]: values; ``topk_index`` [T, k]: places in the block, uint8 (int16 where a block has more than 256)

Kept weights are stored even where they are zero, so the masks come back too. Where a block at the edge has fewer than
its tier's count, the first places that it does not keep stand in, with the value zero.
With int8 values each list is int8 with one float16 scale for every row of a dense or 2:4 block, and for every
top-k block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.block_sparsity.tiers import DENSE, MID, TOPK, TierMap, check_sizes, pad, to_blocks

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
"""Types that values are stored in."""

PARTS = ("map", "dense", "mid", "mid_index", "topk", "topk_index")
_SCALE = ".scale"


@dataclass(frozen=True)
class Layout:
    """What the bytes of a packed matrix do not say themselves."""

    rows: int
    columns: int
    block: int
    k: int

    @property
    def map_shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.rows // self.block), -(-self.columns // self.block)


def pack(weight_RC: Tensor, tiers: TierMap, dtype: torch.dtype) -> dict[str, Tensor]:
    """The kept weights of a matrix.

    Args:
        weight_RC: The matrix.
        tiers: Its tiers; a kept place counts, whatever its value.
        dtype: Type of the values: float16, bfloat16 or float32; int8 adds scales.

    Returns:
        Tensors by ``PARTS``, and for int8 their scales.

    Raises:
        ValueError: A pruned weight is not zero, or a value does not fit the type.
    """
    if ((weight_RC != 0) & ~tiers.keep_RC).any():
        raise ValueError(f"{tiers.name}: a pruned weight is not zero; apply the masks before packing")
    blocks, keep = to_blocks(pad(weight_RC, tiers.block), tiers.block), tiers.keep_rcbb
    mid, kept_mid = blocks[tiers.map_rc == MID].unflatten(-1, (-1, 4)), keep[tiers.map_rc == MID].unflatten(-1, (-1, 4))
    topk, kept_topk = blocks[tiers.map_rc == TOPK].flatten(1), keep[tiers.map_rc == TOPK].flatten(1)
    beyond = ~tiers.exists_rcbb[tiers.map_rc == TOPK].flatten(1)  # where a block at the edge has fewer than k weights
    pairs, places = _first(kept_mid, 2), _first(2 * kept_topk.to(torch.uint8) + beyond, tiers.k)
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).flatten(1)
    parts = {
        "map": pack_map(tiers.map_rc),
        "dense": blocks[tiers.map_rc == DENSE],
        "mid": mid.gather(-1, pairs).flatten(-2),
        "mid_index": (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8),
        "topk": topk.gather(-1, places),
        "topk_index": places.to(index_type(tiers.block)),
    }
    for name in ("dense", "mid", "topk"):
        parts |= _narrow(tiers.name, name, parts[name], dtype)
    return parts


def check_parts(parts: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> None:
    """Refuse tensors that are not what ``pack`` gives for a matrix of this layout with values of this type.

    Raises:
        ValueError: Naming the part that is missing, of another shape or type, or has places that there are not.
    """
    check_sizes(layout.block, layout.k)
    if min(layout.rows, layout.columns) < layout.block:
        raise ValueError(f"a matrix of {layout.rows}×{layout.columns} is smaller than a block of {layout.block}")
    blocks = math.prod(layout.map_shape)
    check_tensors(parts, {"map": ((-(-blocks // 4),), torch.uint8)})
    map_rc = unpack_map(parts["map"], layout)
    if (map_rc > TOPK).any():
        raise ValueError("map has values other than 0, 1 and 2")
    counts = torch.bincount(map_rc.flatten().long(), minlength=3).tolist()
    b = layout.block
    shapes = {"dense": (b, b), "mid": (b, b // 2), "mid_index": (b * b // 8,)}
    shapes |= {"topk": (layout.k,), "topk_index": (layout.k,)}
    tier_of = {"dense": DENSE, "mid": MID, "mid_index": MID, "topk": TOPK, "topk_index": TOPK}
    wanted = {part: (counts[tier_of[part]], *shape) for part, shape in shapes.items()}
    check_tensors(parts, part_types(wanted, layout, dtype))
    check_places(parts, b)


def part_types(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of all parts but the map, from the shapes without scales."""
    types = {"mid_index": torch.uint8, "topk_index": index_type(layout.block)}
    wanted = {part: (shape, types.get(part, dtype)) for part, shape in shapes.items()}
    if dtype == torch.int8:
        wanted |= {part + _SCALE: ((*shapes[part][:-1], 1), torch.float16) for part in ("dense", "mid", "topk")}
    return wanted


def check_tensors(parts: Mapping[str, Tensor], wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Refuse tensors of other shapes or types than these.

    Raises:
        ValueError: Naming the first.
    """
    for part, (shape, dtype) in wanted.items():
        tensor = parts.get(part)
        if tensor is None:
            raise ValueError(f"{part} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{part} is {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} is due")


def check_places(parts: Mapping[str, Tensor], block: int) -> None:
    """Refuse indices that point beyond a block or twice to one place; both forms store them ascending.

    Raises:
        ValueError: There are some.
    """
    places = parts["topk_index"].int()
    if not ((places >= 0) & (places < block * block)).all() or not (places[..., 1:] > places[..., :-1]).all():
        raise ValueError(f"topk_index has places that a block of {block}×{block} does not have, or has one twice")
    for nibble in (parts["mid_index"] & 15, parts["mid_index"] >> 4):
        if not (nibble & 3 < nibble >> 2).all():
            raise ValueError("mid_index names one place of a group of four twice")


def index_type(block: int) -> torch.dtype:
    """Type of a place in a block."""
    return torch.uint8 if block * block <= 256 else torch.int16


def unpack(parts: dict[str, Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The matrix ``[R, C]`` in ``dtype``."""
    map_rc, b = unpack_map(parts["map"], layout), layout.block
    values = {name: _widen(name, parts, dtype) for name in ("dense", "mid", "topk")}
    blocks = torch.zeros(*map_rc.shape, b, b, dtype=dtype, device=map_rc.device)
    blocks[map_rc == DENSE] = values["dense"]
    blocks[map_rc == MID] = _spread_mid(values["mid"], parts["mid_index"], b)
    blocks[map_rc == TOPK] = _spread_topk(values["topk"], parts["topk_index"], b)
    return _trim(blocks, layout)


def block_product(x: Tensor, parts: dict[str, Tensor], layout: Layout, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias, ``[…, C]`` to ``[…, R]``, in the type of ``x``: the whole matrix is expanded, and forgotten."""
    return F.linear(x, unpack(parts, layout, x.dtype), bias)


def unpack_keep(parts: dict[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Tier map ``[r, c]`` and mask bool ``[R, C]``."""
    ones = {**parts, **{name: torch.ones_like(parts[name], dtype=torch.int8) for name in ("dense", "mid", "topk")}}
    plain = {name: value for name, value in ones.items() if not name.endswith(_SCALE)}
    return unpack_map(parts["map"], layout), unpack(plain, layout, torch.int8).bool()


def unpack_map(packed: Tensor, layout: Layout) -> Tensor:
    """The tier map ``[r, c]``."""
    rows, columns = layout.map_shape
    twos = (packed[:, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)) & 3
    return twos.flatten()[: rows * columns].view(rows, columns)


def pack_map(map_rc: Tensor) -> Tensor:
    """Inverse of ``unpack_map``."""
    fours = F.pad(map_rc.flatten(), (0, -map_rc.numel() % 4)).view(-1, 4)
    return fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6


def _first(keep: Tensor, count: int) -> Tensor:
    """Places of the first ``count`` kept entries of the last dimension, ascending; then the largest others fill up."""
    return keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


def _spread_mid(values: Tensor, index: Tensor, b: int) -> Tensor:
    nibbles = torch.stack([index & 15, index >> 4], -1).flatten(1).view(-1, b, b // 4)
    pairs = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    groups = torch.zeros(*pairs.shape[:-1], 4, dtype=values.dtype, device=values.device)
    return groups.scatter_(-1, pairs, values.view(pairs.shape)).flatten(-2)


def _spread_topk(values: Tensor, index: Tensor, b: int) -> Tensor:
    flat = torch.zeros(len(values), b * b, dtype=values.dtype, device=values.device)
    return flat.scatter_(-1, index.long(), values).view(-1, b, b)


def _trim(blocks: Tensor, layout: Layout) -> Tensor:
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)[: layout.rows, : layout.columns]


def fitting(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another type.

    Raises:
        ValueError: One does not fit it.
    """
    stored = values.to(dtype)
    if not stored.isfinite().all():
        raise ValueError(f"{name}: a weight does not fit {dtype}, or is NaN; take bfloat16 or float32")
    return stored


def _narrow(matrix: str, name: str, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values in their stored type, with scales for int8."""
    if dtype != torch.int8:
        return {name: fitting(matrix, values, dtype)}
    # the scale as it is stored: rounding it after dividing would move every value
    scale = (values.float().abs().amax(-1, keepdim=True) / 127).clamp_min(2**-24).half()
    if not scale.isfinite().all():
        raise ValueError(f"{matrix}: a weight is too large for int8 with float16 scales; export in bfloat16 or float32")
    return {name: (values / scale.float()).round().clamp(-127, 127).to(torch.int8), name + _SCALE: scale}


def _widen(name: str, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    scale = parts.get(name + _SCALE)
    return parts[name].to(dtype) if scale is None else (parts[name] * scale.float()).to(dtype)
