"""Every weight update, against least squares solved row by row."""

import pytest
import torch

from common.variants import variants
from lightning_modules.block_sparsity.inputs import Moments
from lightning_modules.block_sparsity.updates.base import Choice, Update, relative_error
from lightning_modules.block_sparsity.updates.conjugate_gradient import ConjugateGradient
from lightning_modules.block_sparsity.updates.obs import Obs

EXAMPLES = [example for kind in variants(Update) for example in kind.examples()]  # type: ignore[type-abstract]


def _problem(rows=12, columns=40, tokens=200, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 10, generator=draw) @ torch.randn(10, columns, generator=draw)  # inputs go together
    x = (x + 0.5 * torch.randn(tokens, columns, generator=draw)) * torch.linspace(0.3, 3, columns)
    weight = torch.randn(rows, columns, generator=draw)
    keep = torch.rand(rows, columns, generator=draw) > 0.5
    return weight, keep, Moments(x.T @ x)


def _error(found, weight, moments, damping=0.01):
    return relative_error(found, weight, Moments(moments.damped(damping).float()))


def _best(weight, keep, moments, damping=0.01):
    """The best values of every row under its mask, by the normal equations."""
    matrix, wanted = moments.damped(damping), weight.double()
    found = torch.zeros_like(wanted)
    for row, mask in enumerate(keep):
        found[row, mask] = torch.linalg.solve(matrix[mask][:, mask], matrix[mask] @ wanted[row])
    return found.float()


@pytest.mark.parametrize("update", EXAMPLES, ids=repr)
def test_an_update_helps_holds_the_mask_and_leaves_its_arguments_alone(update):
    weight, keep, moments = _problem()
    given = [part.clone() for part in (weight, keep, moments.total)]
    found, mask = update.apply(weight, keep, moments)
    assert all(torch.equal(part, before) for part, before in zip((weight, keep, moments.total), given, strict=True))
    assert torch.equal(mask, keep) and (found[~keep] == 0).all() and found.dtype == torch.float32
    masked = _error(weight * keep, weight, moments)
    best = _error(_best(weight, keep, moments), weight, moments)
    assert 0 < best <= _error(found, weight, moments) < masked
    again, _ = update.apply(weight, keep, moments)
    assert torch.equal(found, again)


@pytest.mark.parametrize("update", EXAMPLES, ids=repr)
def test_nothing_changes_where_nothing_is_pruned_and_everything_is_zero_where_all_is(update):
    weight, keep, moments = _problem()
    torch.testing.assert_close(update.apply(weight, torch.ones_like(keep), moments)[0], weight)
    assert (update.apply(weight, torch.zeros_like(keep), moments)[0] == 0).all()


@pytest.mark.parametrize("update", EXAMPLES, ids=repr)
@pytest.mark.parametrize("tokens", [3, 200])
def test_columns_without_inputs_and_few_tokens_are_no_trouble(update, tokens):
    weight, keep, _ = _problem()
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1))
    x[:, 5] = 0
    found, _ = update.apply(weight, keep, Moments(x.T @ x))
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        update.apply(weight, keep, Moments((x.T @ x) * torch.nan))


def test_enough_steps_find_the_best_values_under_the_mask():
    weight, keep, moments = _problem()
    found, _ = ConjugateGradient(steps=80).apply(weight, keep, moments)
    torch.testing.assert_close(found, _best(weight, keep, moments), rtol=1e-3, atol=1e-3)
    errors = [_error(ConjugateGradient(steps=n).apply(weight, keep, moments)[0], weight, moments) for n in (2, 8, 30)]
    assert errors == sorted(errors, reverse=True)


def test_a_start_is_improved():
    weight, keep, moments = _problem()
    start = _error(Obs().apply(weight, keep, moments)[0], weight, moments)
    assert start < 0.9 * _error(weight * keep, weight, moments)
    assert _error(ConjugateGradient(8, Obs()).apply(weight, keep, moments)[0], weight, moments) < 0.98 * start


def test_obs_is_exact_where_only_the_first_columns_go():
    """Nothing is left of them, so all that could make up for them does."""
    weight, keep, moments = _problem()
    keep[:] = torch.arange(40) >= 7
    found, _ = Obs(step=8).apply(weight, keep, moments)
    torch.testing.assert_close(found, _best(weight, keep, moments), rtol=1e-3, atol=1e-3)


def test_obs_does_the_same_in_steps_of_any_size():
    weight, keep, moments = _problem()
    found = [Obs(step=step).apply(weight, keep, moments)[0] for step in (8, 16, 128)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8)])
def test_only_free_weights_get_another_mask(kept, of):
    weight, _, moments = _problem()
    given = torch.arange(40).expand(12, 40) % of < kept
    free = torch.zeros(12, 40, dtype=torch.bool)
    free[:6, 8:32] = True
    found, keep = Obs().apply(weight, given, moments, Choice(free, kept, of))
    assert torch.equal(keep[~free], given[~free]) and not torch.equal(keep, given)
    assert (keep.unflatten(1, (-1, of)).sum(-1) == kept).all() and (found[~keep] == 0).all()
    assert torch.equal(Obs(adaptive=False).apply(weight, given, moments, Choice(free, kept, of))[1], given)
    assert torch.equal(ConjugateGradient(2, Obs()).apply(weight, given, moments, Choice(free, kept, of))[1], keep)


def test_what_is_pruned_already_counts_in_an_unstructured_choice_and_stays():
    weight, _, moments = _problem()
    free = torch.rand(12, 40, generator=torch.Generator().manual_seed(2)) > 0.3
    _, keep = Obs(step=16).apply(weight, free, moments, Choice(free, sparsity=0.5))
    assert not (keep & ~free).any()
    for first in range(0, 40, 16):
        part = keep[:, first : first + 16]
        assert int((~part).sum()) == part.numel() // 2


def test_steps_that_have_more_zeros_than_their_share_leave_the_others_less():
    weight, _, moments = _problem()
    free = torch.ones(12, 40, dtype=torch.bool)
    free[:10, :16] = False
    for sparsity, zeros in ((0.45, [160, 37, 18]), (0.35, [160, 5, 2]), (0.2, [160, 0, 0])):
        _, keep = Obs(step=16).apply(weight, free, moments, Choice(free, sparsity=sparsity))
        assert [int((~part).sum()) for part in keep.split(16, 1)] == zeros
        assert not (keep & ~free).any()


@pytest.mark.parametrize("arguments", [{"damping": 0}, {"damping": float("nan")}, {"step": 12}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Obs(**arguments)
    with pytest.raises(ValueError, match="steps"):
        ConjugateGradient(steps=0)
