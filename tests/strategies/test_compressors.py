"""Laws that every compressor obeys; a new file in strategies/compressors is under them as soon as it exists."""

import copy

import pytest
import torch
import torch.distributed as dist

from bench.side_by_side.oracles import bytes_sent, published_error
from common.variants import variants
from strategies import transport
from strategies.compressors import Codec, Compressor
from strategies.compressors.int8 import Int8
from strategies.compressors.signsgd import SignSGD
from strategies.compressors.sketch import Sketch
from tests.strategies.reductions import exact, gradient, make_unit, reduce

COMPRESSORS = [example for cls in variants(Compressor) for example in cls.examples()]
by_name = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


SIZES = {2: (1, 2, 255, 256, 257, 70_001), 3: (1, 2, 255, 256, 257, 70_001), 4: (1, 257, 9001)}


def _outputs(compressor, sizes):
    return [reduce(copy.deepcopy(compressor), size)[0] for size in sizes]


@by_name
@pytest.mark.parametrize("n", SIZES)
def test_shards_of_every_size_are_close_to_the_mean(compressor, n, two_ranks, three_ranks, four_ranks):
    ranks = {2: two_ranks, 3: three_ranks, 4: four_ranks}[n]
    for size, *outputs in zip(SIZES[n], *ranks.run(_outputs, compressor, SIZES[n]), strict=True):
        mean, wanted = torch.cat(outputs), exact(size, n)
        assert mean.shape == wanted.shape and mean.dtype == torch.float32
        error = (mean - wanted).square().sum().item()
        expected = sum(gradient(rank, size * n).square().sum().item() for rank in range(n)) / n**2
        # an odd number of voters never ties, which triples the vote's; of a few elements all may fall on the wide side
        slack = 4 if size > 1000 else 30
        assert error <= (slack * published_error(compressor) + 1e-12) * expected, size


@by_name
def test_error_is_the_published_one(compressor, two_ranks):
    size = 1 << 19
    mean = torch.cat([output for output, *_ in two_ranks.run(reduce, compressor, size)])
    wanted = exact(size, 2)
    nmse = ((mean - wanted).square().sum() / wanted.square().sum()).item()
    assert nmse == pytest.approx(published_error(compressor), rel=0.1, abs=1e-13)


@by_name
@pytest.mark.parametrize("n", [2, 3, 4])
def test_counted_bytes_are_the_formula_and_the_bytes_passed_on(compressor, n, two_ranks, three_ranks, four_ranks):
    size = 10_007
    for _, counted, passed in {2: two_ranks, 3: three_ranks, 4: four_ranks}[n].run(reduce, compressor, size):
        assert counted == bytes_sent(compressor, size, n)
        assert counted == pytest.approx(passed, abs=1)  # shares of a byte in (n − 1)/n


def test_int8_sends_a_byte_and_a_share_of_a_scale_per_element(two_ranks):
    size = 1 << 20
    (_, counted, _), _ = two_ranks.run(reduce, Int8(), size)
    assert counted == pytest.approx(size * (1 + 4 / 256), rel=1e-3)  # N(1 + 4/B)(n − 1)/n with N = 2·size, n = 2


def _zeros(rank, grad):
    grad.zero_()


def _subnormal(rank, grad):
    grad.fill_(1e-42)


@by_name
def test_zero_gradients_stay_zero(compressor, two_ranks):
    for output, *_ in two_ranks.run(reduce, compressor, 1000, _zeros):
        assert torch.equal(output, torch.zeros(1000))


@by_name
def test_subnormal_gradients_stay_finite(compressor, two_ranks):
    for output, *_ in two_ranks.run(reduce, compressor, 1000, _subnormal):
        assert output.isfinite().all()
        if not (isinstance(compressor, SignSGD) and not compressor.scaled):  # a vote has no size
            assert output.abs().max() < 1e-38


def _bad_on_rank_one(value):
    return {"nan": _nan_on_rank_one, "inf": _inf_on_rank_one}[value]


def _nan_on_rank_one(rank, grad):
    if rank == 1:
        grad[300] = torch.nan


def _inf_on_rank_one(rank, grad):
    if rank == 1:
        grad[300] = torch.inf


@by_name
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_gradient_on_one_rank_is_not_averaged_in_silently(compressor, value, two_ranks):
    owner, other = (output for output, *_ in two_ranks.run(reduce, compressor, 1000, _bad_on_rank_one(value)))
    assert not owner.isfinite().all()
    if isinstance(compressor, Codec | Sketch):  # a codec keeps destinations apart; PowerSGD's factors are everybody's
        assert other.isfinite().all()


def _all_reduced(compressor, sizes):
    grads = [gradient(dist.get_rank(), numel) for numel in sizes]
    for numel, grad in zip(sizes, grads, strict=True):
        copy.deepcopy(compressor).all_reduce(grad, make_unit(numel))
    return grads


@by_name
def test_all_reduce_gives_every_rank_the_same_mean(compressor, three_ranks):
    sizes = (1, 5, 1001)
    for numel, *results in zip(sizes, *three_ranks.run(_all_reduced, compressor, sizes), strict=True):
        grads = torch.stack([gradient(rank, numel) for rank in range(3)])
        assert all(torch.equal(result, results[0]) for result in results), numel
        # thrice the method's own error, and 1 % of what went in: above every rounding, far below any mix-up of shards
        tolerance = (0.01 + 3 * published_error(compressor) ** 0.5) * grads.norm()
        assert (results[0] - grads.mean(0)).norm() <= tolerance, numel


def _mixed_payload():
    rank = dist.get_rank()
    payload = {
        "values": torch.arange(14, dtype=torch.int8).view(2, 7) + 100 * rank,
        "scales": torch.full((2, 3, 2), 0.5 + rank),
        "one": torch.tensor([1.0, 2.0]) + 10 * rank,
    }
    unit = make_unit(14)
    received = transport.all_to_all(payload, unit)  # views of one buffer
    return payload, {role: part.clone() for role, part in received.items()}, unit.traffic.take()


def test_all_to_all_delivers_rows_of_any_dtype_and_shape(two_ranks):
    (sent0, got0, traffic), (sent1, got1, _) = two_ranks.run(_mixed_payload)
    for role in sent0:
        assert got0[role].dtype == sent0[role].dtype
        assert torch.equal(got0[role], torch.stack([sent0[role][0], sent1[role][0]]))
        assert torch.equal(got1[role], torch.stack([sent0[role][1], sent1[role][1]]))
    assert traffic.bytes_by("role") == {"values": 16, "scales": 32, "one": 16}
    assert dict(traffic.calls) == {("unit", "all_to_all"): 1}
