import numpy as np
import pytest

from lightning_modules.data.packing import pack_blocks, pack_whole


def arrays(*lengths):
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]


def test_blocks_are_the_joined_tokens_cut_evenly():
    blocks, rest = pack_blocks(arrays(3, 4, 0, 6), 5)
    assert blocks.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert rest.tolist() == [10, 11, 12]
    assert blocks.dtype == rest.dtype == np.int32


@pytest.mark.parametrize("lengths", [(1, 1, 1, 20), (7, 8, 9, 10), (30,), (0, 0)])
def test_packing_in_many_calls_equals_packing_in_one(lengths):
    pieces = arrays(*lengths)
    whole, end = pack_blocks(pieces, 6)
    blocks, rest = [], np.empty(0, np.int32)
    for piece in pieces:
        packed, rest = pack_blocks([rest, piece], 6)
        blocks += packed.tolist()
    assert blocks == whole.tolist()
    assert rest.tolist() == end.tolist()


def test_too_few_tokens_make_no_block():
    blocks, rest = pack_blocks(arrays(3), 4)
    assert blocks.shape == (0, 4)
    assert rest.tolist() == [0, 1, 2]
    assert pack_blocks([], 4)[0].shape == (0, 4)


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="block_size"):
        pack_blocks([], 0)


def test_whole_sequences_fill_blocks_without_being_cut():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 500).tolist()
    blocks = pack_whole(lengths, 64)
    assert sorted(index for block in blocks for index in block) == list(range(500))
    assert all(sum(lengths[i] for i in block) <= 64 for block in blocks)
    assert len(blocks) <= 1.02 * sum(lengths) / 64 + 1
    assert pack_whole([], 4) == []
    with pytest.raises(ValueError, match="a sequence of 5 tokens does not fit a block of 4"):
        pack_whole([1, 5], 4)
