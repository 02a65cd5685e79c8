"""The two linear codes that learn from the mean gradient."""

import torch
import torch.distributed as dist

from strategies.compressors.gradiveq import GradiVeQ
from strategies.compressors.sketch import Sketch
from tests.strategies.reductions import bytes_passed_on, gradient, make_unit

_SIZE = 8192


def _heavy_mean(compressor):
    """Large on every rank with opposite signs, or moderate with the same one: only the latter is large in the mean."""
    n, rank = dist.get_world_size(), dist.get_rank()
    grad = gradient(rank, n * _SIZE) * 0.1
    grad[::512] += 0.02
    grad[256::512] += 0.05 if rank == 0 else -0.05
    output, sent = torch.empty(_SIZE), torch.empty(n * _SIZE)
    compressor.reduce_scatter(grad, output, make_unit(n * _SIZE), sent)
    exact = sent == grad
    return output[::512], output[256::512], bool((exact | (sent == 0)).all()), (sent != 0).float().mean().item()


def test_a_sketch_finds_what_is_large_in_the_mean(two_ranks):
    for same, opposite, exact, density in two_ranks.run(_heavy_mean, Sketch(0.005, rows=5, width=0.2)):
        assert (same - 0.02).abs().max() < 1e-3
        assert (opposite.abs() < 0.01).all()  # top-k of each rank would have spent its share on these
        assert exact and density <= 0.0051


def _tables(compressor):
    one, two = (gradient(dist.get_rank(), 2 * 1000, step).view(2, -1) for step in (0, 1))
    unit = make_unit(2000)
    tables = [compressor.sketch(x, unit) for x in (one, two, one + two)]
    lone = torch.zeros(1, 1000)
    lone[0, 123] = 2.0
    return *tables, compressor.estimate(compressor.sketch(lone, unit), 1000, unit)[0]


def test_sketches_add_up_and_give_back_a_lone_element(two_ranks):
    for one, two, both, estimate in two_ranks.run(_tables, Sketch(0.1, width=0.1)):
        torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-7)
        assert estimate[123] == 2.0 and (estimate == 0).float().mean() > 0.9


def _in_a_subspace(rank, step, n, basis):
    draw = torch.Generator().manual_seed(31 * step + rank)
    return (torch.randn(n * _SIZE // basis.shape[0], basis.shape[1], generator=draw) @ basis.T).flatten()


def _cycle(compressor, steps):
    """Gradients whose slices lie in a space of 8 dimensions; error, bytes and linearity of the last step."""
    n, rank = dist.get_world_size(), dist.get_rank()
    basis = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(5))).Q
    unit, output = make_unit(n * _SIZE), torch.empty(_SIZE)
    for step in range(steps):
        unit.step = step
        grads = [_in_a_subspace(other, step, n, basis) for other in range(n)]
        unit.traffic.take()
        with bytes_passed_on() as passed:
            compressor.reduce_scatter(grads[rank].clone(), output, unit)
        counted = unit.traffic.take().gradient_bytes()
        assert counted == sum(passed)
    mean = torch.stack(grads).mean(0).view(n, -1)[rank]
    parts = []
    for scale in (1.0, 2.0):
        part, grad = torch.empty(_SIZE), scale * gradient(rank, n * _SIZE, int(scale))
        compressor.reduce_scatter(grad, part, unit)
        parts.append(part)
    both = torch.empty(_SIZE)
    compressor.reduce_scatter(gradient(rank, n * _SIZE, 1) + 2 * gradient(rank, n * _SIZE, 2), both, unit)
    linear = (parts[0] + parts[1] - both).norm() / both.norm()
    return ((output - mean).norm() / mean.norm()).item(), counted, linear.item()


def test_gradiveq_is_exact_in_the_space_it_learnt_and_linear(three_ranks):
    for error, counted, linear in three_ranks.run(_cycle, GradiVeQ(64, 8, exact=2, refresh=10), 4):
        assert error < 1e-4 and linear < 1e-4
        assert counted == 2 * 4 * _SIZE * 8 // 64  # two peers, fp32, 8 of 64 coordinates


def test_gradiveq_loses_what_its_basis_does_not_span(three_ranks):
    for error, *_ in three_ranks.run(_cycle, GradiVeQ(64, 4, exact=2, refresh=10), 4):
        assert 0.3 < error < 0.95


def test_gradiveq_shares_its_basis_after_the_last_exact_step(three_ranks):
    method = GradiVeQ(64, 8, exact=2, refresh=10)
    first, last, again = (three_ranks.run(_cycle, method, steps)[0][1] for steps in (1, 2, 11))
    assert first == again == 2 * 4 * _SIZE and last == 2 * (4 * _SIZE + 4 * 64 * 8)
