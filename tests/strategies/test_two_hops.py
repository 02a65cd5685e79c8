"""The all-to-all in two hops on four gloo ranks that are two nodes of two."""

import pytest
import torch
import torch.distributed as dist

from bench.planning.absent import leaving
from bench.side_by_side.oracles import padded
from strategies import CompressedDDP, CompressedFSDP, CompressedFSDP2
from strategies.compressors import ErrorFeedback, Int4, Int8, NoCompressionA2A, OneBit, TwoHops
from tests.strategies.engines import error, fit, reference
from tests.strategies.reductions import bytes_passed_on, exact, gradient, make_unit

_SIZE = 4099


def _reduce(compressor, size=_SIZE, steps=1):
    """This rank's shard of every step, what was sent by level and by collective, and the residual."""
    n, rank = dist.get_world_size(), dist.get_rank()
    unit, outputs = make_unit(size * n), []
    with bytes_passed_on() as passed:
        for step in range(steps):
            output = torch.full((size,), torch.nan)
            compressor.reduce_scatter(gradient(rank, size * n, step), output, unit)
            outputs.append(output)
    traffic = unit.traffic.take()
    return outputs, dict(traffic.levels), traffic.gradient_bytes(), sum(passed), unit.state.get("residual")


def test_fp32_in_two_hops_is_the_mean(four_ranks):
    mean = exact(_SIZE, 4)
    for rank, (outputs, *_) in enumerate(four_ranks.run(_reduce, TwoHops(NoCompressionA2A(), 2))):
        torch.testing.assert_close(outputs[0], mean[rank * _SIZE : (rank + 1) * _SIZE], rtol=1e-6, atol=1e-9)


def test_codes_cross_the_slow_link_once(four_ranks):
    row = padded(_SIZE) + padded(4 * -(-_SIZE // 256))
    both = padded(2 * _SIZE) + padded(4 * -(-2 * _SIZE // 256))  # two owners' chunks in a row
    flat = four_ranks.run(_reduce, Int8())[0]
    for outputs, levels, counted, passed, _ in four_ranks.run(_reduce, TwoHops(Int8(), 2)):
        assert levels == {"intra": both, "inter": row} and counted == passed == both + row
        assert outputs[0].isfinite().all()
    crossing = flat[2] * 2 / 3  # two of three others are in the other node
    assert crossing / row >= 1.7


@pytest.mark.parametrize("codec", [Int8(), OneBit()], ids=repr)
def test_nothing_is_lost_under_error_feedback(codec, four_ranks):
    """What was applied, and what all ranks still owe, is what there was: both hops' losses."""
    results = four_ranks.run(_reduce, ErrorFeedback(TwoHops(codec, 2, Int4())), steps=3)
    applied = torch.cat([sum(outputs) for outputs, *_ in results])
    owed = torch.stack([residual for *_, residual in results]).mean(0)
    total = sum(torch.stack([gradient(rank, 4 * _SIZE, step) for rank in range(4)]).mean(0) for step in range(3))
    assert owed.abs().max() > 0
    torch.testing.assert_close(applied + owed, total, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "ddp"])
def test_every_engine_reduces_in_two_hops(engine, four_ranks):
    results = four_ranks.run(fit, TwoHops(Int8(16), 2, Int4(16)), engine=engine)
    assert error(results[0], reference(4)) < 0.1
    for result in results[1:]:
        assert all(torch.equal(weight, result["weights"][name]) for name, weight in results[0]["weights"].items())


def _refused(compressor):
    with pytest.raises(ValueError, match="node_size=3 does not divide the 4 ranks"):
        _reduce(compressor)
    return True


def test_nodes_that_do_not_fit_are_refused(four_ranks):
    with pytest.raises(ValueError, match="node_size must be"):
        TwoHops(Int8(), 0)
    assert all(four_ranks.run(_refused, TwoHops(Int8(), 3)))


@pytest.mark.parametrize("engine", [CompressedFSDP, CompressedFSDP2, CompressedDDP])
def test_node_sizes_are_held_against_the_launchers_before_training(engine):
    strategy = engine(compressor=ErrorFeedback(TwoHops(Int8(), 4)))
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 4, 2
    strategy.check_ranks(8)
    with pytest.raises(ValueError, match="node_size=4 does not divide the 6 ranks"):
        strategy.check_ranks(6)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 2, 4
    with pytest.raises(ValueError, match="node_size=4 would put ranks of other nodes into one: a node has 2 here"):
        strategy.check_ranks(8)


def _leaving(collective):
    return leaving(None, collective, 2)


def test_shares_that_leave_a_node(four_ranks):
    assert four_ranks.run(_leaving, "all_to_all") == [2 / 3] * 4 and four_ranks.run(_leaving, "all_gather") == [0.5] * 4
