"""The two methods with a memory of their own."""

import pytest
import torch
import torch.distributed as dist

from strategies import transport
from strategies.compressors.dgc import DGC
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.compressors.powersgd import PowerSGD
from strategies.compressors.sketch import Sketch
from tests.strategies.reductions import gradient, make_unit

_SIZE = 2048


def _steps(compressor, count):
    """Gradients, sent parts and state after ``count`` steps."""
    n = dist.get_world_size()
    unit, output, sent, grads, parts = make_unit(n * _SIZE), torch.empty(_SIZE), torch.empty(n * _SIZE), [], []
    for step in range(count):
        unit.step, grad = step, gradient(dist.get_rank(), n * _SIZE, step)
        grads.append(grad.clone())
        compressor.reduce_scatter(grad, output, unit, sent)
        parts.append(sent.clone())
    return grads, parts, unit.state


def test_dgc_accumulates_momentum_where_nothing_was_sent_and_forgets_it_where_something_was(two_ranks):
    for grads, parts, state in two_ranks.run(_steps, DGC(0.05, momentum=0.9, warmup_steps=0), 3):
        velocity, total = torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
        for grad, sent in zip(grads, parts, strict=True):
            velocity = 0.9 * velocity + grad
            total += velocity
            gone = sent != 0
            torch.testing.assert_close(sent[gone], total[gone])
            velocity[gone] = total[gone] = 0
        torch.testing.assert_close(state["momentum"], velocity)
        torch.testing.assert_close(state["residual"], total)


def test_dgc_thins_out_over_its_warm_up():
    method = DGC(0.001, warmup_steps=8)
    assert [method.selector(step).density for step in range(0, 10, 2)] == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 0.001]


def _same_step_again(compressor, count):
    """Error of what the owners rebuild when every step brings the same low-rank gradient."""
    n, rank = dist.get_world_size(), dist.get_rank()
    unit, output = make_unit(n * _SIZE), torch.empty(_SIZE)
    grad = torch.zeros(n * _SIZE)
    for parameter in unit.parameters:
        a, b = parameter.shape
        draw = torch.Generator().manual_seed(parameter.offset)
        product = torch.randn(a, 3, generator=draw) @ torch.randn(3, b, generator=draw) * (1 + rank)
        grad[parameter.offset : parameter.offset + parameter.numel] = product.flatten()
    mean = grad / (1 + rank) * (1 + n) / 2
    for step in range(count):
        unit.step = step
        compressor.reduce_scatter(grad.clone(), output, unit)
    own = mean.view(n, -1)[rank]
    return ((output - own).norm() / own.norm()).item()


def test_powersgd_is_exact_on_matrices_of_its_rank(two_ranks):
    assert max(two_ranks.run(_same_step_again, PowerSGD(rank=3), 1)) < 1e-5
    assert min(two_ranks.run(_same_step_again, PowerSGD(rank=2), 1)) > 0.1


def test_powersgd_warm_start_finds_the_largest_directions(two_ranks):
    once, often = (min(two_ranks.run(_same_step_again, PowerSGD(rank=2), count)) for count in (1, 20))
    assert often < once


def _extra(compressor):
    """Extra collectives and their time in two reductions, each beside a gather of parameters; and all wire time."""
    n = dist.get_world_size()
    unit = make_unit(n * _SIZE)
    for step in range(2):
        unit.step = step
        unit.traffic.baseline("unit", 0, 0)
        compressor.reduce_scatter(gradient(dist.get_rank(), n * _SIZE), torch.empty(_SIZE), unit)
        transport.gather_parameters(torch.ones(_SIZE), torch.empty(n * _SIZE), unit)
    step = unit.traffic.take()
    return step.extra_calls, step.extra_ms, step.phase_ms("wire")


@pytest.mark.parametrize(("method", "expected"), [(Int8(), 0), (PowerSGD(), 2), (Sketch(), 4)], ids=repr)
def test_collectives_after_the_first_of_a_reduction_are_extra(method, expected, two_ranks):
    for calls, extra_ms, wire_ms in two_ranks.run(_extra, method):
        assert calls == expected and (0 < extra_ms < wire_ms if expected else extra_ms == 0)


def _all_reduced(compressor):
    n, rank = dist.get_world_size(), dist.get_rank()
    grad = gradient(rank, n * _SIZE)
    shard = torch.empty(_SIZE)
    compressor.reduce_scatter(grad.clone(), shard, make_unit(n * _SIZE))
    unit = make_unit(n * _SIZE)
    compressor.all_reduce(grad, unit)
    return torch.equal(grad.view(n, -1)[rank], shard), dict(unit.traffic.take().calls)


def test_powersgd_all_reduces_without_a_gather(three_ranks):
    for same, calls in three_ranks.run(_all_reduced, PowerSGD()):
        assert same and calls == {("unit", "all_reduce"): 2}


@pytest.mark.parametrize("method", [PowerSGD(), ErrorFeedback(PowerSGD())], ids=repr)
def test_powersgd_recovers_after_a_nan(method, two_ranks):
    assert all(two_ranks.run(_after_a_nan, method))


def _after_a_nan(compressor):
    n = dist.get_world_size()
    unit, output = make_unit(n * _SIZE), torch.empty(_SIZE)
    seen = []
    for step in range(3):
        unit.step, grad = step, gradient(dist.get_rank(), n * _SIZE, step)
        if step == 1:
            grad[5] = torch.nan
        compressor.reduce_scatter(grad, output, unit)
        seen.append(output.isfinite().all().item())
    return seen == [True, dist.get_rank() > 0, True] or seen == [True, False, True]
