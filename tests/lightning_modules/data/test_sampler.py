import numpy as np
import pytest

from lightning_modules.data.sampler import FixedOrderSampler, Position, ResumableSampler


def stream(length, start, count, seed=3, world=1, batch=1, lengths=None):
    """The next ``count`` samples in global order, as ``world`` ranks with batches of ``batch`` consume them."""
    ranks = [
        iter(ResumableSampler(length, world, rank, lambda: Position(seed, start), lengths)) for rank in range(world)
    ]
    consumed = []
    while len(consumed) < count:
        step = [[next(rank) for _ in range(batch)] for rank in ranks]
        consumed += [sample for row in zip(*step, strict=True) for sample in row]
    return consumed


def test_one_pass_meets_every_sample_once_and_the_next_pass_in_another_order():
    first, second = stream(50, 0, 50), stream(50, 50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != stream(50, 0, 50, seed=4)
    assert first == stream(50, 0, 50)


@pytest.mark.parametrize("world, batch", [(1, 7), (2, 3), (3, 2), (4, 4)])
def test_any_world_size_continues_the_same_global_order(world, batch):
    straight = stream(48, 0, 48)
    start = 12
    assert stream(48, start, 24, world=world, batch=batch)[:24] == straight[start : start + 24]


def test_ranks_never_share_a_sample_within_a_pass():
    ranks = [list(ResumableSampler(31, 3, rank, lambda: Position(0))) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [10, 10, 10]
    assert len(set().union(*ranks)) == 30


def test_samples_that_fill_no_global_batch_come_first_in_the_next_epoch():
    consumed = stream(10, 0, 9, world=3, batch=1)
    assert sorted(consumed + stream(10, 9, 1)) == list(range(10))


def test_start_is_asked_for_when_iteration_starts():
    position = [Position(3, 0)]
    sampler = ResumableSampler(20, 1, 0, lambda: position[0])
    position[0] = Position(3, 5)
    assert list(sampler)[:15] == stream(20, 0, 20)[5:]


@pytest.mark.parametrize("length, world", [(10, 1), (10, 4), (3, 4), (12, 4)])
def test_validation_is_complete_unrepeated_and_even(length, world):
    ranks = [list(FixedOrderSampler(length, world, rank)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert {len(FixedOrderSampler(length, world, rank)) for rank in range(world)} == {len(ranks[0])}
    samples = [sample for rank in ranks for sample in rank if sample != FixedOrderSampler.PADDING]
    assert sorted(samples) == list(range(length))
    assert all(rank == sorted(rank, key=lambda sample: sample % (length + 1)) for rank in ranks)


def test_samples_of_similar_length_follow_each_other_in_an_order_that_any_ranks_can_continue():
    lengths = np.random.default_rng(0).integers(10, 500, 3000)
    straight = stream(3000, 0, 3000, lengths=lengths)
    assert sorted(straight) == list(range(3000))
    assert stream(3000, 3000, 3000, lengths=lengths) != straight

    def padded(order):
        return sum(8 * lengths[order[i : i + 8]].max() for i in range(0, 3000, 8)) / lengths.sum() - 1

    assert padded(straight) < 0.15 < 0.5 < padded(stream(3000, 0, 3000))
    first, second = np.array(straight[:1024]), np.array(straight[1024:2048])
    assert abs(lengths[first].mean() - lengths[second].mean()) < 30, "no drift from short to long"
    assert stream(3000, 600, 300, world=3, batch=5, lengths=lengths)[:300] == straight[600:900]
