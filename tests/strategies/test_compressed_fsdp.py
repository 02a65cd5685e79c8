"""The engine: real FSDP1 on gloo ranks, through the Trainer."""

import pytest
import torch

from common.variants import variants
from strategies import CompressedFSDP
from strategies.compressors import Compressor
from strategies.compressors.int8 import Int8
from strategies.compressors.none import NoCompression
from tests.strategies.engines import error, fit, reference, tolerance

FIRST = [cls.examples()[0] for cls in variants(Compressor)]
COMPRESSORS = [method for method in FIRST if method.frozen_from is None]  # that needs AdamW: see test_onebit_adam
# one method of each way to reduce: to an engine, those of one way are alike
WAYS = list({(type(method).reduce_scatter, type(method).all_reduce): method for method in COMPRESSORS}.values())


@pytest.mark.parametrize("compressor", WAYS, ids=repr)
@pytest.mark.parametrize("sharding", ["SHARD_GRAD_OP", "NO_SHARD"])  # FULL_SHARD is in test_engines
def test_gradient_through_fsdp_is_the_mean_over_ranks(compressor, sharding, two_ranks):
    results = two_ranks.run(fit, compressor, sharding_strategy=sharding)
    assert error(results[0], reference(2)) < tolerance(compressor)
    for name, weight in results[0]["weights"].items():
        assert torch.equal(weight, results[1]["weights"][name])


def test_every_unit_has_its_name_and_its_parameters(two_ranks):
    units = two_ranks.run(fit, NoCompression())[0]["units"]
    assert [name for name, *_ in units] == ["root", "net.blocks.0", "net.blocks.1"]
    root, first, _ = units
    assert first[1] == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert root[1] == ["net.inlet.weight", "net.inlet.bias", "net.outlet.weight", "net.outlet.bias"]
    assert first[3] == 7 * 13 + 13 + 13 * 7 + 7 <= first[2]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_reduces_in_fp32(precision, two_ranks):
    result = two_ranks.run(fit, NoCompression(), precision=precision)[0]
    ideal = sum(result["traffic"].ideal.values())
    assert result["traffic"].gradient_bytes() == pytest.approx(2 * ideal)  # gloo's factor, 4-byte elements
    assert error(result, reference(2)) < 2e-2


@pytest.mark.parametrize("sharding", ["HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"])
def test_hybrid_sharding_is_refused(sharding):
    with pytest.raises(ValueError, match="inter-node"):
        CompressedFSDP(compressor=Int8(), sharding_strategy=sharding)


def test_parameter_gathers_are_counted(two_ranks):
    traffic = two_ranks.run(fit, Int8(), steps=1)[0]["traffic"]
    gathered = {unit for unit, collective in traffic.calls if collective == "all_gather"}
    assert gathered == {"root", "net.blocks.0", "net.blocks.1"}
    assert traffic.parameter_bytes() > 0
