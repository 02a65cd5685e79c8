"""Put token sequences into blocks of one length: cut to fit, or whole. Pure numpy."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack_blocks(pieces: Sequence[NDArray[np.int32]], block_size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Join ``pieces`` end to end and cut the result into blocks.

    Give the rest back as the first piece of the next call, and a corpus packed in many calls equals the corpus packed
    in one: only the last ``rest`` (less than a block) is ever lost.

    Args:
        pieces: One-dimensional token arrays.
        block_size: Tokens in a block.

    Returns:
        ``(blocks[n, block_size], rest[m])`` with ``m < block_size``.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    tokens = np.concatenate([np.empty(0, np.int32), *pieces])
    whole = len(tokens) // block_size * block_size
    return tokens[:whole].reshape(-1, block_size), tokens[whole:]


def pack_whole(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sequences over blocks without cutting any: best-fit decreasing, in O(n log n).

    Args:
        lengths: Tokens of each sequence.
        capacity: Tokens in a block.

    Returns:
        The sequences of each block, by index.

    Raises:
        ValueError: a sequence is longer than a block.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a block of {capacity}")
    blocks: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, block), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], 0))
        free, block = room.pop(place) if place < len(room) else (capacity, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(index)
        insort(room, (free - lengths[index], block))
    return blocks
