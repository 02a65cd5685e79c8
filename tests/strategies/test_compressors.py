"""Laws that every compressor obeys; a new file in strategies/compressors is under them as soon as it exists."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from strategies import transport
from strategies.compressors import Codec, known_compressors
from strategies.compressors.int8 import Int8
from strategies.traffic import Traffic
from strategies.units import Unit

COMPRESSORS = [cls() for cls in known_compressors()]
by_name = pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.name)

# Normalised squared error of the mean of 2 ranks on Gaussian gradients: 2⁻²ᵇ-type formulas confirmed by measurement.
NMSE = {"none": 0.0, "none_a2a": 0.0, "bf16": 2.8e-6, "fp16": 4.3e-8, "int8": 4.9e-5}
# Bytes that one rank sends for N elements in rows of s to n ranks (rows and parts padded to 16 bytes).
SENT = {
    "none": lambda s, n: 2 * 4 * s * (n - 1),  # gloo's reduce-scatter is an all-reduce
    "none_a2a": lambda s, n: _padded(4 * s) * (n - 1),
    "bf16": lambda s, n: _padded(2 * s) * (n - 1),
    "fp16": lambda s, n: (_padded(2 * s) + 16) * (n - 1),
    "int8": lambda s, n: (_padded(s) + _padded(4 * -(-s // 256))) * (n - 1),
}


def _padded(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def _gradient(rank: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 + rank)) * 1e-3


def _unit(numel: int) -> Unit:
    return Unit("unit", [], numel, dist.group.WORLD, Traffic())


def _reduce(compressor, size: int, edit=None):
    """Reduce one gradient of n·size elements; the shard, the counted and the really passed bytes."""
    rank, n = dist.get_rank(), dist.get_world_size()
    grad = _gradient(rank, size * n)
    if edit is not None:
        edit(rank, grad)
    unit, output = _unit(size * n), torch.full((size,), torch.nan)
    passed = []
    real = dist.batch_isend_irecv

    def counting(operations):
        passed.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return real(operations)

    with mock.patch.object(dist, "batch_isend_irecv", counting):
        compressor.reduce_scatter(grad, output, unit)
    return output, unit.traffic.take().gradient_bytes(), sum(passed)


def _exact(size: int, n: int, edit=None) -> torch.Tensor:
    grads = [_gradient(rank, size * n) for rank in range(n)]
    if edit is not None:
        for rank, grad in enumerate(grads):
            edit(rank, grad)
    return torch.stack(grads).mean(0)


@by_name
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 70_001])
@pytest.mark.parametrize("n", [2, 3])
def test_shards_of_every_size_are_close_to_the_mean(compressor, size, n, two_ranks, three_ranks):
    ranks = {2: two_ranks, 3: three_ranks}[n]
    mean = torch.cat([output for output, *_ in ranks.run(_reduce, compressor, size)])
    exact = _exact(size, n)
    assert mean.shape == exact.shape and mean.dtype == torch.float32
    nmse = ((mean - exact).square().sum() / exact.square().sum()).item()
    slack = 2 if size > 1000 else 30  # a handful of elements may all fall on the wide side of a rounding step
    assert nmse <= slack * NMSE[compressor.name] + 1e-12


@by_name
def test_error_is_the_published_one(compressor, two_ranks):
    size = 1 << 19
    mean = torch.cat([output for output, *_ in two_ranks.run(_reduce, compressor, size)])
    exact = _exact(size, 2)
    nmse = ((mean - exact).square().sum() / exact.square().sum()).item()
    assert nmse == pytest.approx(NMSE[compressor.name], rel=0.1, abs=1e-13)


@by_name
@pytest.mark.parametrize("n", [2, 3])
def test_counted_bytes_are_the_formula_and_the_bytes_passed_on(compressor, n, two_ranks, three_ranks):
    size = 10_007
    for _, counted, passed in {2: two_ranks, 3: three_ranks}[n].run(_reduce, compressor, size):
        assert counted == SENT[compressor.name](size, n)
        if isinstance(compressor, Codec):
            assert counted == passed


def test_int8_sends_a_byte_and_a_share_of_a_scale_per_element(two_ranks):
    size = 1 << 20
    (_, counted, _), _ = two_ranks.run(_reduce, Int8(), size)
    assert counted == pytest.approx(size * (1 + 4 / 256), rel=1e-3)  # N(1 + 4/B)(n − 1)/n with N = 2·size, n = 2


def _zeros(rank, grad):
    grad.zero_()


def _subnormal(rank, grad):
    grad.fill_(1e-42)


@by_name
def test_zero_gradients_stay_zero(compressor, two_ranks):
    for output, *_ in two_ranks.run(_reduce, compressor, 1000, _zeros):
        assert torch.equal(output, torch.zeros(1000))


@by_name
def test_subnormal_gradients_stay_finite(compressor, two_ranks):
    for output, *_ in two_ranks.run(_reduce, compressor, 1000, _subnormal):
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
    owner, other = (output for output, *_ in two_ranks.run(_reduce, compressor, 1000, _bad_on_rank_one(value)))
    assert not owner.isfinite().all()
    assert other.isfinite().all()


def _all_reduce(compressor, numel: int):
    grad = _gradient(dist.get_rank(), numel)
    compressor.all_reduce(grad, _unit(numel))
    return grad


@by_name
@pytest.mark.parametrize("numel", [1, 5, 1001])
def test_all_reduce_gives_every_rank_the_same_mean(compressor, numel, three_ranks):
    results = three_ranks.run(_all_reduce, compressor, numel)
    grads = torch.stack([_gradient(rank, numel) for rank in range(3)])
    assert all(torch.equal(result, results[0]) for result in results)
    # 1 % of what went in is well above every 8-bit method's error and far below any mix-up of shards.
    assert (results[0] - grads.mean(0)).norm() <= 0.01 * grads.norm()


@by_name
def test_same_gradient_same_result(compressor, two_ranks):
    first, second = (two_ranks.run(_reduce, compressor, 5000) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@by_name
def test_config_repeats_the_constructor(compressor):
    again = type(compressor)(**compressor.config())
    assert again.config() == compressor.config()


@pytest.mark.parametrize("block_size", [0, -1])
def test_int8_refuses_blocks_that_are_none(block_size):
    with pytest.raises(ValueError, match="block_size"):
        Int8(block_size=block_size)


def _mixed_payload():
    rank = dist.get_rank()
    payload = {
        "values": torch.arange(14, dtype=torch.int8).view(2, 7) + 100 * rank,
        "scales": torch.full((2, 3, 2), 0.5 + rank),
        "one": torch.tensor([1.0, 2.0]) + 10 * rank,
    }
    unit = _unit(14)
    return payload, transport.all_to_all(payload, unit), unit.traffic.take()


def test_all_to_all_delivers_rows_of_any_dtype_and_shape(two_ranks):
    (sent0, got0, traffic), (sent1, got1, _) = two_ranks.run(_mixed_payload)
    for role in sent0:
        assert got0[role].dtype == sent0[role].dtype
        assert torch.equal(got0[role], torch.stack([sent0[role][0], sent1[role][0]]))
        assert torch.equal(got1[role], torch.stack([sent0[role][1], sent1[role][1]]))
    assert traffic.bytes_by("role") == {"values": 16, "scales": 32, "one": 16}
    assert dict(traffic.calls) == {("unit", "all_to_all"): 1}
