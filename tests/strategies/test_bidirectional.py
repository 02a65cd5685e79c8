"""Codes both ways: all ranks equal, nothing lost under error feedback, bytes by the formula."""

import pytest
import torch
import torch.distributed as dist

from bench.side_by_side.oracles import bytes_sent
from strategies import residuals
from strategies.compressors.bidirectional import Bidirectional
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.onebit import OneBit
from strategies.compressors.powersgd import PowerSGD
from strategies.compressors.topk import TopK
from strategies.compressors.warmup import WarmUp
from strategies.traffic import Traffic
from strategies.units import ParameterSlice, Unit
from tests.strategies.reductions import bytes_passed_on, gradient, make_unit

METHODS = [
    Bidirectional(ErrorFeedback(Int4())),
    Bidirectional(ErrorFeedback(OneBit())),
    Bidirectional(ErrorFeedback(TopK(0.1)), Int8()),
    Bidirectional(ErrorFeedback(OneBit(), "bfloat16"), Int4(stochastic=True)),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=repr)
_NUMEL = 9001  # of no number of ranks


def _steps(method, steps=6):
    """Sums over steps of this rank's gradient and of the mean; the residual at the end."""
    unit, given, taken = make_unit(_NUMEL), torch.zeros(_NUMEL), torch.zeros(_NUMEL)
    for step in range(steps):
        unit.step, grad = step, gradient(dist.get_rank(), _NUMEL, step)
        given += grad
        method.all_reduce(grad, unit)
        taken += grad
    owed = residuals.load(unit, "residual", 0, torch.device("cpu")).clone()
    return given, taken, owed


@by_method
def test_what_arrived_and_what_is_owed_are_the_sum_of_the_gradients(method, three_ranks):
    results = three_ranks.run(_steps, method)
    for _, taken, _ in results:
        assert torch.equal(taken, results[0][1])  # equal on all ranks, bit for bit
    given, owed = (torch.stack([result[part][:_NUMEL] for result in results]).mean(0) for part in (0, 2))
    rough = {"rtol": 1e-2, "atol": 1e-4} if method.inner.storage == "bfloat16" else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(results[0][1] + owed, given, **rough)


def _error(method):
    grad = gradient(dist.get_rank(), 1 << 16)
    exact = grad.clone()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    method.all_reduce(grad, make_unit(1 << 16))
    return ((grad - exact).norm() / exact.norm()).item()


def test_the_error_is_that_of_both_ways(two_ranks):
    one, both = (two_ranks.run(_error, method)[0] for method in (Int8(), Bidirectional(Int8())))
    assert both == pytest.approx(2**0.5 * one, rel=0.1)


def _bytes(method, numel):
    unit = make_unit(numel)
    with bytes_passed_on() as passed:
        method.all_reduce(gradient(dist.get_rank(), numel), unit)
    return unit.traffic.take().gradient_bytes(), sum(passed)


@pytest.mark.parametrize("method", [Bidirectional(Int8()), Bidirectional(ErrorFeedback(Int4()), Int8())], ids=repr)
def test_bytes_are_those_of_both_codes(method, three_ranks):
    there = method.inner.inner if isinstance(method.inner, ErrorFeedback) else method.inner
    size = -(-_NUMEL // 3)
    for counted, passed in three_ranks.run(_bytes, method, _NUMEL):
        assert counted == passed == bytes_sent(there, size, 3) + bytes_sent(Int8(), size, 3)


def _padded(method):
    """Ten real elements, six of alignment, twelve real ones, four at the end, on two ranks."""
    parameters = [ParameterSlice("a", (10,), 0), ParameterSlice("b", (3, 4), 16)]
    unit = Unit("unit", parameters, 32, dist.group.WORLD, Traffic())
    for _ in range(3):
        grad = gradient(dist.get_rank(), 32).abs()
        grad[10:16] = grad[28:] = 0
        method.all_reduce(grad, unit)
    return grad, unit.state["residual"]


@by_method
def test_nothing_lies_on_padding(method, two_ranks):
    for grad, owed in two_ranks.run(_padded, method):
        for part in (grad, owed):
            assert not part[10:16].any() and not part[28:].any() and part[:10].any()


def _with_nan(method):
    unit, results = make_unit(_NUMEL), []
    for step in range(3):
        unit.step, grad = step, gradient(dist.get_rank(), _NUMEL, step)
        if step == 1 and dist.get_rank() == 1:
            grad[7] = torch.nan
        method.all_reduce(grad, unit)
        results.append((bool(grad.isfinite().all()), bool(unit.state["residual"].isfinite().all())))
    return results


@by_method
def test_a_nan_is_seen_on_all_ranks_and_kept_on_none(method, two_ranks):
    for results in two_ranks.run(_with_nan, method):
        assert results == [(True, True), (False, True), (True, True)]


def test_error_feedback_outside_or_a_way_back_without_a_codec_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="put error feedback inside"):
        ErrorFeedback(Bidirectional(Int8()))
    with pytest.raises(ValueError, match="back="):
        Bidirectional(PowerSGD())


def _sent(method):
    unit = make_unit(1 << 12)
    method.all_reduce(gradient(dist.get_rank(), 1 << 12), unit)
    return unit.traffic.take().gradient_bytes()


def test_a_warm_up_sends_both_ways_as_the_method_that_it_ends_in(two_ranks):
    inner = Bidirectional(Int8())
    (after, alone), *_ = zip(two_ranks.run(_sent, WarmUp(inner, 0)), two_ranks.run(_sent, inner), strict=True)
    assert after == alone < two_ranks.run(_sent, WarmUp(inner, 1))[0] / 3
