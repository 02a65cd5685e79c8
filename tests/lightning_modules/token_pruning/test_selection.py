"""Selecting, taking and putting back, against loops over single tokens."""

import pytest
import torch

from lightning_modules.token_pruning.selection import put, select, take


def _by_hand(scores, budget, protected, real):
    """Indices that stay in one row, chosen one after the other."""
    places = [i for i in range(len(scores)) if real[i]]
    ranked = sorted(places, key=lambda i: (not protected[i], -scores[i], i))
    return sorted(ranked[:budget])


@pytest.mark.parametrize("padded", [False, True])
def test_selection_is_the_best_scored_in_order(padded):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 5, (3, 12), generator=generator).float()  # many ties
        pads = [0, 3, 6] if padded else [0, 0, 0]
        real = torch.stack([torch.arange(12) >= pad for pad in pads])
        protected = (torch.rand(3, 12, generator=generator) < 0.2) & real
        budgets = [max(int(protected[row].sum()), 4) for row in range(3)]
        if not padded:
            budgets = [max(budgets)] * 3
        index, mask = select(scores, budgets, protected, real if padded else None)
        assert index.shape[1] == max(budgets)
        for row in range(3):
            kept = index[row] if mask is None else index[row][mask[row]]
            assert kept.tolist() == _by_hand(scores[row].tolist(), budgets[row], protected[row], real[row])
            if mask is not None:  # what fills a short row stands before its tokens
                assert mask[row].tolist() == sorted(mask[row].tolist())


def test_no_score_outranks_a_protected_token_and_nan_comes_last():
    scores = torch.tensor([[torch.inf, 1.0, torch.nan, -torch.inf, 2.0]])
    protected = torch.tensor([[False, False, False, True, False]])
    index, mask = select(scores, [3], protected)
    assert index.tolist() == [[0, 3, 4]] and mask is None
    assert 2 not in select(scores, [4], protected)[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_take_is_gather_and_put_is_its_inverse(rows):
    values = torch.randn(rows, 7, 4, requires_grad=True)
    index = torch.stack([torch.randperm(7)[:5].sort().values for _ in range(3)])[: max(rows, 1)]
    taken = take(values, index)
    assert torch.equal(taken, values.gather(1, index[..., None].expand(-1, -1, 4)))
    real = torch.rand(index.shape) < 0.5
    back = put(taken, index, real, 7)
    for row in range(len(index)):
        for place in range(7):
            there = (index[row] == place) & real[row]
            assert torch.equal(back[row, place], values[row, place] if there.any() else torch.zeros(4))
    back.sum().backward()
    assert values.grad.any()


def test_rows_that_share_one_table_each_take_their_own_places():
    table, index = torch.randn(1, 6, 2), torch.tensor([[0, 3], [2, 5]])
    assert torch.equal(take(table, index), table[0][index])
