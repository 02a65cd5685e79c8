"""Parameters on their way under FSDP2: compressed from the master weights, and counted; on gloo ranks."""

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from strategies import CompressedFSDP2
from strategies.compressors.bf16 import BF16
from strategies.compressors.hadamard import Hadamard
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.none import NoCompression
from strategies.fsdp2_collectives import EncodedAllGather
from strategies.fsdp2_units import sharded_modules
from strategies.traffic import Traffic
from tests.strategies.engines import Module, Net, fit, rows
from tests.strategies.reductions import make_unit


def _run(*args, **kwargs):
    return fit(*args, engine="fsdp2", **kwargs)


_POLICIES = {"fp32": MixedPrecisionPolicy(), "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}


def _gathered(codec, policy):
    """Parameters as forward sees them, the exact ones, and what was sent for them."""
    torch.manual_seed(0)
    net, traffic, handed = Net(), Traffic(), []
    exact = {name: p.detach().clone() for name, p in net.named_parameters()}
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=_POLICIES[policy])
    (sharded,) = sharded_modules(net, traffic)

    class Watched(EncodedAllGather):
        def __call__(self, output_tensor, input_tensor, group, async_op=False):
            handed.append((input_tensor.dtype, self.sharded.master_shard().dtype))
            return super().__call__(output_tensor, input_tensor, group, async_op)

    net.set_custom_all_gather(Watched(sharded, codec))
    net(torch.zeros(1, 5))  # the root stays gathered after forward
    seen = {name: p.detach().float().clone() for name, p in net.named_parameters()}
    return seen, exact, traffic.take(), handed, sharded.gathered.numel


@pytest.mark.parametrize("policy", _POLICIES)
def test_parameters_are_encoded_from_the_master_weights_within_the_codecs_error(policy, three_ranks):
    results = three_ranks.run(_gathered, Int8(64), policy)
    seen, exact, traffic, handed, numel = results[0]
    # FSDP2 hands over the compute dtype; what is encoded is the optimizer's fp32.
    assert handed == [({"fp32": torch.float32, "bf16": torch.bfloat16}[policy], torch.float32)]
    largest = max(weight.abs().max().item() for weight in exact.values())
    rounding = largest * 2**-9 if policy == "bf16" else 0.0
    errors = torch.cat([(seen[name] - weight).flatten() for name, weight in exact.items()])
    assert 0 < errors.abs().max() <= largest / 254 * 1.001 + rounding
    for other, *_ in results[1:]:  # all ranks compute with the same weights, the owner too
        assert all(torch.equal(weight, other[name]) for name, weight in seen.items())
    shard = numel // 3
    padded = {"values": -(-shard // 16) * 16, "scales": -(-4 * -(-shard // 64) // 16) * 16}
    assert traffic.bytes_by("role", gradients=False) == {f"parameters.{k}": 2 * v for k, v in padded.items()}
    assert traffic.gradient_bytes() == 0


@pytest.mark.parametrize("codec", [Int8(32), BF16()], ids=lambda c: c.name)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_compressed_parameters_stays_close(codec, precision, two_ranks):
    exact, coded = (
        two_ranks.run(_run, NoCompression(), steps=4, parameter_compressor=p, precision=precision)[0]
        for p in (None, codec)
    )
    assert coded["losses"] == pytest.approx(exact["losses"], rel=0.05)
    assert coded["traffic"].gradient_bytes() == exact["traffic"].gradient_bytes()
    wide = 4 if precision == "32-true" else 2  # bytes of an element that FSDP2 gathers by itself
    # shards of 40 elements (1 gather a step) and twice 112 (2 gathers), codes and scales each padded to 16 bytes
    narrow = {"int8": (48 + 16 + 4 * (112 + 16)) / (40 + 4 * 112), "bf16": 2}[codec.name]
    ratio = coded["traffic"].parameter_bytes() / exact["traffic"].parameter_bytes()
    assert ratio == pytest.approx(narrow / wide, rel=1e-6)
    # bf16 on the wire is what bf16 compute sees anyway; everything else must show that it was applied
    assert (coded["losses"] == exact["losses"]) == ((codec.name, precision) == ("bf16", "bf16-mixed"))


def test_parameters_alone_can_be_compressed(two_ranks):
    result = two_ranks.run(_run, None, parameter_compressor=Int8(32))[0]
    assert result["traffic"].parameter_bytes() > 0 == result["traffic"].gradient_bytes()


def _differences(steps=6, **options):
    codec = Hadamard(Int4(32), 8)
    return _run(NoCompression(), steps=steps, parameter_compressor=codec, parameter_differences=True, **options)


def test_four_bits_of_differences_are_nearly_exact_and_gathered_once(two_ranks):
    exact = two_ranks.run(_run, NoCompression(), steps=6)[0]
    plain = two_ranks.run(_run, NoCompression(), steps=6, parameter_compressor=Int4(32))[0]
    coded, other = two_ranks.run(_differences)
    assert all(torch.equal(weight, other["weights"][name]) for name, weight in coded["weights"].items())

    def off(result):
        return max(abs(a / b - 1) for a, b in zip(result["losses"], exact["losses"], strict=True))

    assert 0 < off(coded) < off(plain) / 5
    # a gather each of the five steps after the exact first: 40 and twice 112 elements, half a byte and their scales
    first, step = 4 * (40 + 2 * 112), (32 + 16) + 2 * (64 + 16)
    assert coded["traffic"].parameter_bytes() == first + 5 * step


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_differences_go_on_bit_for_bit(kind, two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    through = two_ranks.run(_differences, steps=4, state_dict_type=kind)
    two_ranks.run(_differences, folder=path, steps=2, state_dict_type=kind)
    for rank, resumed in enumerate(two_ranks.run(_differences, ckpt_path=path, steps=4, state_dict_type=kind)):
        assert resumed["losses"] == through[rank]["losses"][2:]
        assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in through[rank]["weights"].items())


def _after_validation(folder=None, ckpt_path=None):
    """Three steps with a validation after each; saved where one has just gathered the weights, of the second step."""
    module, checked = Module(), [torch.zeros(4, 5)]
    module.validation_step = lambda batch, batch_idx: module.net(batch).sum()
    strategy = CompressedFSDP2(NoCompression(), Hadamard(Int4(32), 8), True)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    sent = []

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            sent.append(strategy.traffic.take().parameter_bytes())

        def on_validation_end(self, trainer, *args):
            if folder is not None and trainer.global_step == 2:
                trainer.save_checkpoint(folder)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_steps=4,
        val_check_interval=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[Saving()],
        **quiet,
    )
    loader = DataLoader(TensorDataset(rows(dist.get_rank())), batch_size=4)
    trainer.fit(module, loader, checked, ckpt_path=ckpt_path)
    return module.losses, sent


def test_what_is_known_after_a_resume_stays_known(two_ranks, tmp_path):
    path = str(tmp_path / "middle.ckpt")
    whole = two_ranks.run(_after_validation, folder=path)
    for rank, (losses, sent) in enumerate(two_ranks.run(_after_validation, ckpt_path=path)):
        assert losses == whole[rank][0][2:]
        # weights gathered whole once, for forward and backward; differences alone from the next step on
        assert sent == [4 * (40 + 2 * 112), whole[rank][1][3]]


def test_differences_go_on_with_other_ranks_from_exact_weights(two_ranks, three_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    before = two_ranks.run(_differences, folder=path, steps=2)[0]
    after = three_ranks.run(_differences, ckpt_path=path, steps=2)[0]
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())


def test_differences_need_a_codec_that_shrinks_errors():
    for codec in (None, Int4(stochastic=True)):
        with pytest.raises(ValueError, match="parameter_differences"):
            CompressedFSDP2(parameter_compressor=codec, parameter_differences=True)


def _outlier(codec):
    values = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    values[0, 7] = 50.0
    unit = make_unit(512)
    decoded = codec.decode(codec.encode(values, unit), 256, unit)
    return ((decoded - values).norm() / values.norm()).item()


def test_rotation_spreads_outliers(two_ranks):
    plain, rotated = (two_ranks.run(_outlier, codec)[0] for codec in (Int4(), Hadamard(Int4())))
    assert rotated < 0.6 * plain
    with pytest.raises(ValueError, match="power of two"):
        Hadamard(Int4(), 24)
