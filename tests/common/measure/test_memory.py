"""Peaks of known size, kernels that really run, and the search for the largest size."""

import pytest
import torch
import torch.nn.functional as F

from common.measure.memory import (
    attention_kernels,
    limit_process,
    longest_that_fits,
    peak_bytes,
    resident_now,
    resident_peak,
)
from tests.ranks import FORKED


def test_peak_is_the_most_held_at_once_not_the_sum():
    def call():
        first = torch.ones(1 << 20)
        del first
        return torch.ones(1 << 18) + torch.ones(1 << 18)

    assert (1 << 22) <= peak_bytes(call, torch.device("cpu")) < (1 << 22) + (1 << 16)


def test_kernels_are_those_that_run():
    q = torch.randn(1, 2, 8, 16)
    flash = attention_kernels(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    by_hand = attention_kernels(lambda: (q @ q.transpose(-1, -2)).softmax(-1) @ q)
    assert "flash" in flash[0] and by_hand == ["aten._softmax.default"]


@pytest.mark.parametrize("largest", [0, 1023, 1024, 5000, 8191, 8192, 10_000])
def test_the_search_ends_within_its_resolution(largest):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= largest

    found = longest_that_fits(fits, 1024, 8192, 100)
    if largest < 1024:
        assert found == 0 and tried == [1024]
    else:
        assert found <= largest and (found == 8192 or largest - found < 100) and len(tried) < 12


@pytest.mark.parametrize("sizes", [(0, 5, 1), (5, 4, 1), (5, 9, 0)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="start"):
        longest_that_fits(lambda size: True, *sizes)


def _limited():
    before = resident_now()
    limit_process(64 << 20)
    small = torch.ones(4 << 20)  # 16 MB
    grown = resident_peak() - before
    try:
        torch.ones(32 << 20)
    except RuntimeError as error:
        return grown, small.sum().item(), str(error)
    return None


def test_a_limited_process_survives_asking_for_too_much():
    with FORKED.Pool(1) as pool:
        grown, total, error = pool.apply(_limited)
    assert 16 << 20 <= grown < 32 << 20 and total == 4 << 20 and "alloc" in error
