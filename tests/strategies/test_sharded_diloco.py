"""Local training of replicas that shard their model: two groups of two gloo ranks."""

import pytest
import torch

from strategies import ShardedDiLoCo
from strategies.compressors import Bidirectional, ErrorFeedback, Int4, Int8, OneBitAdam
from tests.strategies.engines import Module, fit

CODED = Bidirectional(ErrorFeedback(Int4(16)), Int8(16))


def _local(compressor=None, **options):
    return fit(compressor, engine=ShardedDiLoCo, replicas=2, **options)


def test_meeting_after_every_step_is_hybrid_sharding(four_ranks):
    """SGD is linear: the mean of what replicas have come to is what their mean gradient would have made."""
    every_step = four_ranks.run(fit, None, engine="fsdp2", replicas=2, steps=4)[0]
    for result in four_ranks.run(_local, steps=4, sync_every=1, outer_lr=1.0, outer_momentum=0.0):
        for name, weight in every_step["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_replicas_part_and_agree_in_the_end(four_ranks):
    results = four_ranks.run(_local, Int8(16), steps=5, sync_every=2, replica_compressor=CODED, start="whole")
    losses = [result["losses"] for result in results]
    assert losses[0] != losses[2]
    for result in results[1:]:
        assert all(torch.equal(weight, result["weights"][name]) for name, weight in results[0]["weights"].items())
    traffic = results[0]["traffic"]
    assert traffic.levels["inter"] > 0 and traffic.levels["intra"] > traffic.levels["inter"]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_training_goes_on_bit_for_bit_in_the_middle_of_a_round(kind, four_ranks, tmp_path):
    options = {"sync_every": 4, "replica_compressor": CODED, "state_dict_type": kind}
    options |= {"num_fragments": 2, "fragment_sync_delay": 1} if kind == "sharded" else {}
    path = str(tmp_path / "last.ckpt")
    through = four_ranks.run(_local, steps=8, **options)
    four_ranks.run(_saved, path, options)
    for rank, resumed in enumerate(four_ranks.run(_local, ckpt_path=path, steps=8, **options)):
        assert resumed["losses"] == through[rank]["losses"][3:]
        for name, weight in through[rank]["weights"].items():
            assert torch.equal(weight, resumed["weights"][name])


def _saved(path, options):
    """A run of eight steps that saves after the third."""

    class Saving(Module):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 3:
                self.trainer.save_checkpoint(path)

    _local(steps=8, module=Saving(), **options)


def _refusal(**options):
    try:
        _local(**options)
    except ValueError as refused:
        return str(refused)
    return "accepted"


def _refusal_of_manual():
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    return _refusal(module=Manual())


def test_what_cannot_work_is_refused_by_name(four_ranks):
    with pytest.raises(ValueError, match="replicas must be at least 2"):
        ShardedDiLoCo(1)
    with pytest.raises(ValueError, match="gradients of every step"):
        ShardedDiLoCo(2, OneBitAdam())
    with pytest.raises(ValueError, match="sync_every"):
        ShardedDiLoCo(2, sync_every=0)
    for said in four_ranks.run(_refusal, precision="16-mixed"):
        assert "16-mixed" in said
    for said in four_ranks.run(_refusal_of_manual):
        assert said.startswith("Manual has automatic_optimization=False") and "CompressedFSDP2" in said
