"""Error feedback: nothing is lost, on padding, under NaN, in any storage."""

import pytest
import torch
import torch.distributed as dist

from common.variants import variants
from strategies import residuals
from strategies.compressors import Compressor
from strategies.compressors.error_feedback import ErrorFeedback, keeps_residual
from strategies.compressors.int8 import Int8
from strategies.compressors.onebit import OneBit
from strategies.compressors.qsgd import QSGD
from strategies.compressors.randomk import RandomK
from strategies.compressors.topk import TopK
from strategies.traffic import Traffic
from strategies.units import ParameterSlice, Unit
from tests.strategies.reductions import gradient, make_unit


def _wrappable(compressor):
    try:
        ErrorFeedback(compressor)
    except ValueError:
        return False
    return True


INNER = [example for cls in variants(Compressor) for example in cls.examples() if _wrappable(example)]
_STEPS, _SIZE = 5, 3001


def _run(compressor):
    """Sums over steps: gradients, outputs, what was sent; and the residual at the end."""
    n = dist.get_world_size()
    unit, output, sent = make_unit(n * _SIZE), torch.empty(_SIZE), torch.empty(n * _SIZE)
    sums = [torch.zeros(n * _SIZE), torch.zeros(_SIZE), torch.zeros(n * _SIZE)]
    for step in range(_STEPS):
        unit.step, grad = step, gradient(dist.get_rank(), n * _SIZE, step)
        sums[0] += grad
        compressor.reduce_scatter(grad, output, unit, sent)
        sums[1] += output
        sums[2] += sent
    return *sums, residuals.load(unit, "residual", 0, torch.device("cpu")).clone()


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_what_was_sent_and_the_residual_are_the_sum_of_the_gradients(inner, two_ranks):
    results = two_ranks.run(_run, ErrorFeedback(inner))
    for gradients, _, sent, residual in results:
        torch.testing.assert_close(sent + residual, gradients, rtol=1e-4, atol=1e-7)
    received = torch.cat([output for _, output, *_ in results])
    due = torch.stack([gradients - residual for gradients, *_, residual in results]).mean(0)
    torch.testing.assert_close(received, due, rtol=1e-4, atol=1e-7)


def test_most_methods_can_be_wrapped_and_those_with_feedback_cannot():
    names = {type(compressor).__name__ for compressor in INNER}
    assert {"Int8", "TopK", "OneBit", "RandomK", "QSGD", "TernGrad", "ThresholdV", "NaturalCompression"} <= names
    assert not any(keeps_residual(part) for compressor in INNER for part in compressor.within())


def _quadratic(compressor, rate):
    """Gradient descent on ‖x‖²/2 with noise, gradients through ``compressor``; ‖x‖ at the end over the start."""
    n, size, rank = dist.get_world_size(), 512, dist.get_rank()
    x, unit, whole = torch.ones(n * size), make_unit(n * size), torch.empty(n * size)
    for step in range(400):
        unit.step = step
        grad, shard = x + gradient(rank, n * size, step), torch.empty(size)
        compressor.reduce_scatter(grad, shard, unit)
        dist.all_gather(list(whole.view(n, -1)), shard)
        x = x - rate * whole
    return x.norm().item() / (n * size) ** 0.5


@pytest.mark.parametrize("inner", [RandomK(0.05), QSGD(levels=1), TopK(0.05), OneBit()], ids=repr)
def test_descent_with_error_feedback_converges(inner, two_ranks):
    # scaled random-k and QSGD as they are diverge under error feedback; their contractive forms do not
    assert max(two_ranks.run(_quadratic, ErrorFeedback(inner), 0.02)) < 0.05


def _padded_unit():
    """Ten real elements, six of alignment, twelve real ones, four at the end, on two ranks."""
    parameters = [ParameterSlice("a", (10,), 0), ParameterSlice("b", (3, 4), 16)]
    return Unit("unit", parameters, 32, dist.group.WORLD, Traffic())


def _on_padding(compressor):
    unit, output = _padded_unit(), torch.empty(16)
    for _ in range(3):
        grad = gradient(dist.get_rank(), 32).abs()
        grad[10:16] = grad[28:] = 0
        compressor.reduce_scatter(grad, output, unit)
    return output, unit.state["residual"], unit.padding_within(8, 30), unit.padding_within(28, 40)


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_residual_and_result_are_zero_on_padding(inner, two_ranks):
    (first, residual, around, tail), (second, other, *_) = two_ranks.run(_on_padding, ErrorFeedback(inner))
    assert around == [(2, 8), (20, 22)] and tail == [(0, 12)]
    assert not first[10:].any() and not second[12:].any()
    for kept in (residual, other):
        assert not kept[10:16].any() and not kept[28:].any()


def _one_bit_means(_):
    grad = torch.cat([torch.full((10,), 2.0), torch.zeros(6), torch.full((12,), 3.0), torch.zeros(4)])
    output = torch.empty(16)
    OneBit().reduce_scatter(grad, output, _padded_unit())
    return output


def test_padding_counts_in_no_mean(two_ranks):
    first, second = two_ranks.run(_one_bit_means, None)
    assert torch.equal(first, torch.tensor([2.0] * 10 + [0.0] * 6))
    assert torch.equal(second, torch.tensor([3.0] * 12 + [0.0] * 4))


def _with_nan(compressor):
    """A good step, a step with a NaN on rank 1, a good step."""
    n = dist.get_world_size()
    unit, outputs, kept = make_unit(n * _SIZE), [], []
    for step in range(3):
        unit.step, grad, output = step, gradient(dist.get_rank(), n * _SIZE, step), torch.empty(_SIZE)
        if step == 1 and dist.get_rank() == 1:
            grad[7] = torch.nan
        compressor.reduce_scatter(grad, output, unit)
        outputs.append(output)
        kept.append(residuals.load(unit, "residual", 0, torch.device("cpu")).clone())
    return outputs, kept


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_nan_is_seen_by_its_owner_and_leaves_the_residual_finite(inner, storage, two_ranks):
    (owner, first), (_, second) = two_ranks.run(_with_nan, ErrorFeedback(inner, storage))
    assert owner[0].isfinite().all() and not owner[1].isfinite().all() and owner[2].isfinite().all()
    assert all(kept.isfinite().all() for kept in first + second)
    rounding = {"float32": 0.0, "int8": 2e-5}[storage]  # kept values share a scale with their neighbours
    assert second[1][7].item() == pytest.approx(second[0][7].item(), abs=rounding, rel=0)  # still owed


@pytest.mark.parametrize(("storage", "bytes_per_element", "tolerance"), [("bfloat16", 2, 3e-3), ("int8", 1.02, 1e-2)])
def test_smaller_storage_is_smaller_and_close(storage, bytes_per_element, tolerance, two_ranks):
    unit_bytes = two_ranks.run(_stored_bytes, ErrorFeedback(Int8(), storage))
    assert all(size == pytest.approx(bytes_per_element * 2 * 4096, rel=1e-2) for size in unit_bytes)
    owed = gradient(0, 5000)
    stored = residuals._encode(owed, storage)
    error = residuals._decode(stored[""], stored.get(".scales")) - owed
    assert 0 < error.norm() / owed.norm() < tolerance


def _stored_bytes(compressor):
    unit = make_unit(2 * 4096)
    compressor.reduce_scatter(gradient(dist.get_rank(), 2 * 4096), torch.empty(4096), unit)
    return sum(part.nbytes for part in unit.state.values())


def _three_owe(storage):
    units = []
    for rank in range(3):
        unit = make_unit(12)
        residuals.store(unit, "residual", gradient(rank, 12), storage)
        units.append(dict(unit.state))
    layout = [["a", [12], 0]]
    now = make_unit(14)
    now.parameters = [ParameterSlice("a", (12,), 0)]
    return units, residuals.split(units, layout, now), residuals.norm([unit])


def test_on_another_number_of_ranks_the_mean_still_owed_is_kept(two_ranks):
    units, state, norm = two_ranks.run(_three_owe, "float32")[0]
    owed = torch.stack([unit["residual"] for unit in units]).mean(0)
    torch.testing.assert_close(state["residual"], torch.cat([owed, torch.zeros(2)]))
    assert norm == pytest.approx(gradient(2, 12).norm().item())
