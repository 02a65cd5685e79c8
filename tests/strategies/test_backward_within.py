"""Parameters that backward gathers inside a node, of what forward saw; on four gloo ranks, two nodes of two."""

import pytest
import torch

from strategies import CompressedFSDP2
from strategies.compressors import Int8, NoCompression
from tests.strategies.engines import fit


def _fit(**options):
    return fit(NoCompression(), engine="fsdp2", steps=3, **options)


@pytest.mark.parametrize("codec", [None, Int8(16)], ids=repr)
def test_training_is_the_same_with_fewer_bytes_between_nodes(codec, four_ranks):
    flat = four_ranks.run(_fit, parameter_compressor=codec)
    for rank, result in enumerate(four_ranks.run(_fit, parameter_compressor=codec, backward_within=2)):
        assert result["losses"] == flat[rank]["losses"]
        assert all(torch.equal(weight, flat[rank]["weights"][name]) for name, weight in result["weights"].items())
        traffic = result["traffic"]
        assert 0 < traffic.levels["intra"] < traffic.parameter_bytes()
        # forward gathers all three units over all ranks as before, backward two of them over two
        over_all = traffic.parameter_bytes() - traffic.levels["intra"]
        assert over_all < 0.6 * flat[rank]["traffic"].parameter_bytes() if codec is None else True


def test_what_cannot_work_is_refused_by_name():
    for options in ({"backward_within": 1}, {"backward_within": 2, "sharding_strategy": "SHARD_GRAD_OP"}):
        with pytest.raises(ValueError, match="backward_within"):
            CompressedFSDP2(**options)
    for within, ranks in ((3, 4), (4, 4)):
        with pytest.raises(ValueError, match=f"backward_within={within} must be a divisor"):
            CompressedFSDP2(backward_within=within).check_ranks(ranks)
