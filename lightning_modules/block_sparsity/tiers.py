"""Three tiers of one weight matrix: which block keeps all weights, two of every four, or its k best.

Shape legend: R, C rows and columns of a matrix; r, c rows and columns of blocks; b side of a block (b divides R and C
after padding). Blocks at the right and lower edge are filled up with weights that do not exist and are never kept.
"""

import torch
from torch import Tensor

DENSE, MID, TOPK = 0, 1, 2
NAMES = ("dense", "2:4", "topk")

Index = tuple[Tensor, Tensor]
"""Rows and columns ``int64 [n]`` of blocks."""


def check_sizes(block: int, k: int, values: str = "float16") -> None:
    """Refuse block sizes and k that the tiers cannot have, packed with values of a type.

    Raises:
        ValueError: ``block`` is not a multiple of 4 between 4 and 128, or k is not between 1 and ``most_topk``.
    """
    if block % 4 or not 4 <= block <= 128:
        raise ValueError(f"block must be a multiple of 4 between 4 and 128, got {block}")
    most = most_topk(block, values)
    if not 1 <= k <= most:
        raise ValueError(
            f"topk must be between 1 and {most} of the {block * block} weights of a {block}×{block} block, got {k}: "
            f"with more, a top-k block takes more bytes than the 2:4 block that it is cut from"
        )


def most_topk(block: int, values: str = "float16") -> int:
    """The largest k whose block is not larger than a 2:4 block, packed with 16-bit values, or with "int8" ones.

    int8 values come with a 16-bit scale for every row of a 2:4 block, and one for a top-k block.
    """
    index = 8 if block * block <= 256 else 16
    if values == "int8":
        return (5 * block * block + 16 * block - 16) // (8 + index)
    return 9 * block * block // (16 + index)


class TierMap:
    """Tier map and kept weights of one matrix. It only ever loses weights.

    Args:
        name: The matrix's name, for messages.
        shape: Its rows and columns.
        block: Side of a block.
        k: Weights that a top-k block keeps.
        device: Where the map and the mask live.

    Attributes:
        map_rc: uint8, ``DENSE``, ``MID`` or ``TOPK`` of every block.

    Raises:
        ValueError: The matrix is smaller than a block, or see ``check_sizes``.
    """

    def __init__(self, name: str, shape: tuple[int, int], block: int, k: int, device: torch.device) -> None:
        check_sizes(block, k)
        rows, columns = shape
        if rows < block or columns < block:
            raise ValueError(f"{name}: a matrix of {rows}×{columns} is smaller than a block of {block}×{block}")
        self.name = name
        self.shape = (rows, columns)
        self.block, self.k = block, k
        self.map_rc = torch.zeros(-(-rows // block), -(-columns // block), dtype=torch.uint8, device=device)
        padded = torch.zeros(len(self.map_rc) * block, self.map_rc.shape[1] * block, dtype=torch.bool, device=device)
        padded[:rows, :columns] = True
        self._padded_keep = padded

    @property
    def keep_RC(self) -> Tensor:
        """bool, True where a weight is kept; a view."""
        return self._padded_keep[: self.shape[0], : self.shape[1]]

    @property
    def keep_rcbb(self) -> Tensor:
        """The same by blocks, padding included; a view."""
        return to_blocks(self._padded_keep, self.block)

    @property
    def exists_rcbb(self) -> Tensor:
        """By blocks, bool, which weights there are: not those that fill up blocks at the edge."""
        exists = torch.zeros_like(self._padded_keep)
        exists[: self.shape[0], : self.shape[1]] = True
        return to_blocks(exists, self.block)

    def counts(self) -> tuple[int, int, int]:
        """Blocks in each tier."""
        dense, mid, topk = torch.bincount(self.map_rc.flatten().long(), minlength=3).tolist()
        return dense, mid, topk

    def kept(self, index: Index) -> Tensor:
        """The mask of some blocks, bool ``[n, b, b]``."""
        return take_blocks(self._padded_keep, index, self.block)

    def demote(self, index: Index, tier: int, keep_nbb: Tensor) -> Tensor:
        """Move blocks one tier down.

        Args:
            index: The blocks; each must be in the tier above.
            tier: ``MID`` or ``TOPK``.
            keep_nbb: bool, what they keep; of that, what was pruned before stays pruned.

        Returns:
            What they keep now.

        Raises:
            RuntimeError: A block is not in the tier above.
        """
        if (self.map_rc[index] != tier - 1).any():
            raise RuntimeError(f"{self.name}: a block that is not {NAMES[tier - 1]} cannot be demoted to {NAMES[tier]}")
        places = _pieces(index, self._padded_keep.shape[1], self.block)
        pieces = self._padded_keep.view(-1, self.block)
        kept = pieces.index_select(0, places).logical_and_(keep_nbb.reshape(-1, self.block))
        pieces.index_copy_(0, places, kept)
        self.map_rc[index] = tier
        return kept.view(keep_nbb.shape)

    def choose(self, keep_RC: Tensor) -> None:
        """Replace the mask by another that the map allows.

        Raises:
            ValueError: It does not.
        """
        self.keep_RC.copy_(keep_RC)
        self.check()

    def kept_per_block(self) -> Tensor:
        """Weights that every block keeps, int64 ``[r, c]``, as its tier and its place at the edge say."""
        b, device = self.block, self.map_rc.device
        rows, columns = self.shape
        height_r = (rows - b * torch.arange(len(self.map_rc), device=device)).clamp_max(b)
        width_c = (columns - b * torch.arange(self.map_rc.shape[1], device=device)).clamp_max(b)
        half_c = width_c // 4 * 2 + (width_c % 4).clamp_max(2)
        dense, mid = height_r[:, None] * width_c, height_r[:, None] * half_c
        return torch.where(self.map_rc == DENSE, dense, torch.where(self.map_rc == MID, mid, mid.clamp_max(self.k)))

    def check(self) -> None:
        """Prove that the mask is what the map promises.

        Raises:
            ValueError: Naming the first block that breaks its tier's rule.
        """
        blocks, exists = self.keep_rcbb, self.exists_rcbb
        if (self.map_rc > TOPK).any():
            raise ValueError(f"{self.name}: the tier map has values other than 0, 1 and 2")
        pairs = (blocks.unflatten(-1, (-1, 4)).sum(-1) <= 2).all(-1).all(-1) | (self.map_rc == DENSE)
        fine = pairs & (blocks.sum((-1, -2)) == self.kept_per_block()) & ~(blocks & ~exists).any(-1).any(-1)
        bad = (~fine).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            tier = NAMES[int(self.map_rc[row, column])]
            raise ValueError(f"{self.name}: the mask of block ({row}, {column}) is not that of a {tier} block")

    def state(self) -> dict[str, Tensor]:
        """Map and mask as small tensors on the CPU: one byte a block, one bit a weight."""
        return {"map": self.map_rc.cpu().clone(), "keep": pack_bits(self._padded_keep.cpu())}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``state`` gave.

        Raises:
            ValueError: It belongs to a matrix of another shape or block size, or breaks the tiers' rules.
        """
        tier_map, bits = state["map"], state["keep"]
        if tier_map.shape != self.map_rc.shape or bits.numel() != -(-self._padded_keep.numel() // 8):
            raise ValueError(
                f"{self.name}: the tier map has {tuple(tier_map.shape)} blocks, a matrix of {self.shape[0]}×"
                f"{self.shape[1]} in blocks of {self.block} has {tuple(self.map_rc.shape)}: it is another model's or "
                "another block size's"
            )
        self.map_rc.copy_(tier_map)
        self._padded_keep.copy_(unpack_bits(bits, self._padded_keep.numel()).view(self._padded_keep.shape))
        self.check()

    def to(self, device: torch.device) -> None:
        """Move map and mask."""
        self.map_rc, self._padded_keep = self.map_rc.to(device), self._padded_keep.to(device)


def to_blocks(matrix: Tensor, block: int) -> Tensor:
    """``[R, C]`` as ``[r, c, b, b]``; a view, both sides must be multiples of the block."""
    return matrix.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)


def take_blocks(matrix: Tensor, index: Index, block: int) -> Tensor:
    """Some blocks ``[n, b, b]`` of a matrix, whose sides must be multiples of the block."""
    places = _pieces(index, matrix.shape[1], block)
    return matrix.reshape(-1, block).index_select(0, places).view(-1, block, block)


def _pieces(index: Index, columns: int, block: int) -> Tensor:
    """Which of the pieces of b elements, that a matrix consists of, blocks consist of; ``[n·b]``: copied whole each."""
    row, column = index
    rows = row[:, None] * block + torch.arange(block, device=row.device)
    return (rows * (columns // block) + column[:, None]).flatten()


def pad(matrix: Tensor, block: int) -> Tensor:
    """The matrix, or vector, with zeros to the right and below, so that blocks fit; itself where they do already."""
    missing = [-side % block for side in matrix.shape]
    if not any(missing):
        return matrix
    return torch.nn.functional.pad(matrix, [n for side in reversed(missing) for n in (0, side)])


def pack_bits(flags: Tensor) -> Tensor:
    """Booleans of any shape as uint8, eight a byte, the first in the lowest bit."""
    flat = flags.flatten()
    bits = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_bits``: the first ``count`` booleans, flat."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten()[:count].bool()
