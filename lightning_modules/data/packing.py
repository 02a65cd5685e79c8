"""Join token arrays and cut them into blocks of one length. Pure numpy."""

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
