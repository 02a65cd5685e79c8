"""Random numbers are a function of seed, step, unit and rank: never the same twice, and the same when repeated."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common.variants import variants
from strategies.compressors import Codec, Compressor, Int8, RandomK
from strategies.compressors.blocks import BlockCodec
from strategies.fsdp2_collectives import EncodedAllGather
from strategies.fsdp2_units import sharded_modules
from strategies.traffic import Traffic
from tests.strategies.engines import ENGINES, Net, fit
from tests.strategies.reductions import gradient, make_unit

COMPRESSORS = [example for cls in variants(Compressor) for example in cls.examples()]
CODECS = [codec for codec in COMPRESSORS if isinstance(codec, Codec)]
_SIZE = 3000


def _outputs(compressor, *settings):
    outputs = []
    for setting in settings:
        output, n = torch.empty(_SIZE), dist.get_world_size()
        compressor.reduce_scatter(gradient(dist.get_rank(), n * _SIZE), output, make_unit(n * _SIZE, **setting))
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_what_another_seed_changes_another_step_changes_too(compressor, two_ranks):
    first, seed, step = {"seed": 1, "step": 500}, {"seed": 2, "step": 500}, {"seed": 1, "step": 501}
    for one, same, other, later in two_ranks.run(_outputs, compressor, first, first, seed, step):
        assert torch.equal(one, same)
        assert torch.equal(one, later) == torch.equal(one, other)
        if getattr(compressor, "draws", False) or isinstance(compressor, RandomK):
            assert not torch.equal(one, other)


def _codes(codec):
    n = dist.get_world_size()
    unit = make_unit(n * _SIZE, step=3, seed=1)
    other = make_unit(n * _SIZE, step=3, seed=1)
    other.name = "another unit"
    chunks = gradient(0, n * _SIZE).view(n, -1)  # the same on every rank
    return [codec.encode(chunks, one)["values"] for one in (unit, other)]


@pytest.mark.parametrize("codec", [c for c in CODECS if isinstance(c, BlockCodec) and c.draws], ids=repr)
def test_ranks_and_units_round_independently(codec, two_ranks):
    (first, elsewhere), (second, _) = two_ranks.run(_codes, codec)
    assert not torch.equal(first, second) and not torch.equal(first, elsewhere)


def test_ranks_choose_the_same_random_elements(two_ranks):
    (first, elsewhere), (second, _) = two_ranks.run(_codes, RandomK(0.1))
    assert torch.equal(first, second) and not torch.equal(first, elsewhere)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_tell_methods_the_step(engine, two_ranks):
    first, second = two_ranks.run(fit, RandomK(0.3), steps=2, engine=engine)[0]["grads"]
    assert any(not torch.equal(first[name] != 0, second[name] != 0) for name in first)


def _gathers(steps):
    """The same weights, gathered by a stochastic codec at these steps."""
    torch.manual_seed(0)
    net, step = Net(), iter(steps)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=True)
    (sharded,) = sharded_modules(net, Traffic())

    def tell(unit):
        unit.step = next(step)

    gather, numel = EncodedAllGather(sharded, Int8(stochastic=True), tell), sharded.gathered.numel
    found = []
    for _ in steps:
        found.append(torch.empty(numel))
        gather(found[-1], torch.empty(0), sharded.gathered.group)
    return found


def test_parameters_are_rounded_otherwise_in_every_step_and_alike_within_one(two_ranks):
    one, other = two_ranks.run(_gathers, (1, 1, 2))
    assert torch.equal(one[0], one[1]) and not torch.equal(one[0], one[2])
    assert all(map(torch.equal, one, other))


class Watching(Codec):
    """Notes what it is told of time."""

    name, seen = "watching", []

    def encode(self, chunks, unit):
        self.seen.append((unit.seed, unit.step))
        return {"values": chunks}

    def decode(self, payload, size, unit):
        return payload["values"]


def _times(seed):
    Watching.seen.clear()
    with mock.patch.dict(os.environ, {"PL_GLOBAL_SEED": str(seed + dist.get_rank())}):
        fit(Watching(), engine="fsdp2", steps=3, parameter_compressor=Watching())
    return list(Watching.seen)


def test_an_engine_tells_the_first_ranks_seed_and_the_step_also_when_parameters_are_gathered(two_ranks):
    one, other = two_ranks.run(_times, 7)
    assert one == other and {seed for seed, _ in one} == {7} and {step for _, step in one} == {0, 1, 2}
