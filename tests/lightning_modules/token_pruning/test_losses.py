"""Each loss against its formula, written out with loops."""

import math

import pytest
import torch

from lightning_modules.token_pruning import losses

SCORES = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -3.0, 7.0]], requires_grad=True)
TARGET = torch.tensor([[1.0, 0.0, 3.0, 9.0], [2.0, 2.0, 2.0, 5.0]])
VALID = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)


def test_regression():
    terms = [(SCORES[b, n] - TARGET[b, n]) ** 2 for b in range(2) for n in range(3)]
    assert losses.regression(SCORES, TARGET, VALID).item() == pytest.approx(sum(terms).item() / 6)
    assert losses.regression(SCORES, TARGET, VALID & False).item() == 0


def test_ranking_is_the_mean_over_pairs_without_ties():
    terms, scores = [], SCORES.detach()
    for i in range(3):
        for j in range(3):
            order = math.copysign(1, (TARGET[0, i] - TARGET[0, j]).item()) if TARGET[0, i] != TARGET[0, j] else 0
            if order:
                terms.append(math.log1p(math.exp(-(scores[0, i] - scores[0, j]) * order)))
    torch.manual_seed(0)
    # the second row is all ties and adds nothing
    assert losses.ranking(scores, TARGET, VALID, 40_000).item() == pytest.approx(sum(terms) / len(terms), rel=0.02)


def test_ranking_sees_valid_tokens_only_and_rows_without_any_are_fine():
    only = VALID.clone()
    only[1] = False
    wild = TARGET.clone()
    wild[~only] = torch.nan
    found = losses.ranking(SCORES, wild, only, 64)
    found.backward()
    assert found.isfinite() and SCORES.grad.isfinite().all() and not SCORES.grad[~only].any()
    assert losses.ranking(SCORES, TARGET, VALID & False, 8).item() == 0


def test_normalised_targets_have_mean_0_and_deviation_1():
    normal = losses.normalise(TARGET, VALID)
    row = TARGET[0, :3]
    torch.testing.assert_close(normal[0, :3], (row - row.mean()) / row.std(correction=0))
    assert normal[0, 3] == 0 and not normal[1].any()  # all equal: nothing to learn


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_normalised_values_do_not_depend_on_their_unit_and_rounding_is_no_difference(scale):
    torch.testing.assert_close(losses.normalise(TARGET * scale, VALID), losses.normalise(TARGET, VALID))
    rounded = torch.tensor([[0.1, 0.1 + 1e-8, 0.1 - 1e-8, 5.0]]) * scale
    assert not losses.normalise(rounded, VALID[:1]).any()


@pytest.mark.parametrize("valid", [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]], ids=["none", "one", "equal"])
def test_where_all_are_equal_the_normalised_gradient_is_finite(valid):
    scores = TARGET[1:].clone().requires_grad_()
    (losses.normalise(scores, torch.tensor([valid], dtype=torch.bool)) * SCORES.detach()[:1]).sum().backward()
    assert not scores.grad.any()


def test_kept_share():
    share = torch.tensor([0.5, 0.25])
    terms = [(torch.sigmoid(SCORES[b, :3]).mean() - share[b]) ** 2 for b in range(2)]
    assert losses.kept_share(SCORES, VALID, share).item() == pytest.approx((sum(terms) / 2).item())
