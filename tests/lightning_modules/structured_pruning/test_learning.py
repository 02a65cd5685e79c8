"""What one MLP learns from its own rows."""

import copy

import pytest
import torch

from lightning_modules.structured_pruning.compensation.reconstruction import Reconstruction
from lightning_modules.structured_pruning.learning import Row, learn
from tests.lightning_modules.structured_pruning.test_compensation import _refitted
from tests.lightning_modules.structured_pruning.toy import batches, tiny


def _rows(target, count: int = 24, noise: float = 0.0) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(count, 10, 32, generator=draw)
    with torch.no_grad():
        wanted = target(given) + noise * torch.randn(count, 10, 32, generator=draw)
    return [Row(x, y, torch.ones(10)) for x, y in zip(given, wanted, strict=True)]


def _error(mlp, rows) -> float:
    with torch.no_grad():
        left = sum((row.weights[:, None] * (mlp(row.given) - row.wanted).square()).sum() for row in rows)
    return float(left / sum((row.weights[:, None] * row.wanted.square()).sum() for row in rows))


def _mlps():
    """Two that differ in gate_proj alone: no down_proj makes the one give what the other does."""
    right = tiny().model.layers[1].mlp
    wrong = copy.deepcopy(right)
    wrong.gate_proj.weight.data += 0.1 * torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    return right, wrong


def test_what_no_refit_can_give_is_learnt_and_told_of_rows_held_out():
    right, wrong = _mlps()
    rows = _rows(right)
    before = _error(wrong, rows[::8])
    learned = learn(wrong, rows, steps=60, learning_rate=3e-3, rows_a_step=6)
    assert learned.before == pytest.approx(before, rel=1e-5)
    assert learned.after == pytest.approx(_error(wrong, rows[::8]), rel=1e-5) and learned.after < 0.6 * before
    assert all(p.grad is None for p in wrong.parameters())


def test_the_first_step_is_adams():
    right, wrong = _mlps()
    rows = [Row(row.given, row.wanted, torch.arange(1.0, 11.0)) for row in _rows(right)]
    expected = copy.deepcopy(wrong).requires_grad_(True)
    learnt = [row for i, row in enumerate(rows) if i % 8]
    sum((row.weights[:, None] * (expected(row.given) - row.wanted).square()).sum() for row in learnt).backward()
    learn(wrong, rows, steps=1, learning_rate=1e-4, rows_a_step=100)
    for one, other in zip(wrong.parameters(), expected.parameters(), strict=True):
        sure = other.grad.abs() > 1e-3 * other.grad.abs().max()
        torch.testing.assert_close(one[sure], (other - 1e-4 * other.grad.sign()).detach()[sure], atol=2e-6, rtol=0)


def test_what_is_farther_on_rows_held_out_is_forgotten():
    right, _ = _mlps()
    as_it_was = copy.deepcopy(right)
    learned = learn(right, _rows(right, noise=1.0), steps=40, learning_rate=1e-2, rows_a_step=6)
    assert learned.before == learned.after
    for one, other in zip(right.parameters(), as_it_was.parameters(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_learns_in_single():
    """Steps so small that half precision would round each away."""
    right, wrong = (mlp.to(torch.bfloat16) for mlp in _mlps())
    rows = [Row(*(part.bfloat16() for part in row)) for row in _rows(copy.deepcopy(right).float())]
    learned = learn(wrong, rows, steps=60, learning_rate=2e-4, rows_a_step=6)
    assert learned.after < 0.97 * learned.before
    assert {p.dtype for p in wrong.parameters()} == {torch.bfloat16}


def test_a_layers_mlp_learns_after_its_refit():
    kept = {"damping": [1e-1]}
    sliced, _, found = _refitted(
        Reconstruction(steps=30, learning_rate=2e-3, rows=8, **kept), batches(20), name="mistral"
    )
    assert {fit["matrix"] for fit in found.fits} == {"self_attn.o_proj", "mlp.down_proj", "mlp"}
    learned = [fit for fit in found.fits if fit["matrix"] == "mlp"]
    assert all(fit["refitted"] <= fit["left"] for fit in learned)
    assert min(fit["refitted"] / fit["left"] for fit in learned) < 0.997
    assert any("gate_proj" in name for name in found.tensors)
    for name, tensor in found.tensors.items():
        assert torch.equal(dict(sliced.named_parameters())[name], tensor)
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"rows": 0}):
        with pytest.raises(ValueError, match=f"compensation: {next(iter(wrong))} must be positive"):
            Reconstruction(**wrong)
