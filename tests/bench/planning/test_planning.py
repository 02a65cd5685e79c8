"""What is planned, without memory and without other ranks, is what a run of real ranks holds and sends."""

import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from bench import __main__ as command
from bench.planning import check_shape, plan
from bench.planning.absent import planned
from lightning_modules.data.tokenizer import train_bpe
from strategies import CompressedDDP, CompressedDiLoCo, CompressedFSDP, CompressedFSDP2, ShardedDiLoCo
from strategies.compressors import Bidirectional, ErrorFeedback, Int4, Int8, PowerSGD, TwoHops
from tests.bench.test_memory import Module
from tests.conftest import ROOT
from tests.lightning_modules.structured_pruning.toy import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse by an old name
_QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
_STEPS = 4
TWO_LEVELS = {"replicas": 2, "replica_compressor": Bidirectional(ErrorFeedback(Int4(16)), Int8(16))}
CASES = {
    "fsdp2": (CompressedFSDP2, {"compressor": ErrorFeedback(Int8()), "parameter_compressor": Int8()}),
    "fsdp2, gathered once": (CompressedFSDP2, {"compressor": Int4(16), "sharding_strategy": "SHARD_GRAD_OP"}),
    "fsdp2, two levels": (CompressedFSDP2, {"compressor": Int8(16), **TWO_LEVELS}),
    "fsdp2, torch's replicas": (CompressedFSDP2, {"compressor": Int8(16), "replicas": 2}),
    "fsdp2, backward within": (CompressedFSDP2, {"compressor": Int8(16), "backward_within": 2}),
    "fsdp2, two hops": (CompressedFSDP2, {"compressor": TwoHops(Int8(16), 2, Int4(16))}),
    "fsdp2, differences": (
        CompressedFSDP2,
        {"compressor": Int8(16), "parameter_compressor": Int4(16), "parameter_differences": True},
    ),
    "fsdp2, bf16": (CompressedFSDP2, {"compressor": Int8(16), "parameter_compressor": Int8(16)}),
    "fsdp1, bf16": (CompressedFSDP, {"compressor": Int8(16)}),
    "ddp, bf16": (CompressedDDP, {"compressor": Int8(16)}),
    "fsdp1": (CompressedFSDP, {"compressor": ErrorFeedback(PowerSGD(2))}),
    "ddp": (CompressedDDP, {"compressor": Int8(16)}),
    "ddp, two levels": (CompressedDDP, {"compressor": Int8(16), **TWO_LEVELS}),
    "local steps of groups": (
        ShardedDiLoCo,
        {"replicas": 2, "replica_compressor": Bidirectional(Int8(16)), "compressor": Int8(16), "sync_every": 2},
    ),
    "local steps": (CompressedDiLoCo, {"compressor": Bidirectional(Int8(16)), "sync_every": 2}),
}


class Watched(Module):
    """Notes what it holds, on whole local tensors: FSDP1's too."""

    def on_before_optimizer_step(self, optimizer):
        if not optimizer.state:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        units = self.trainer.strategy.units
        self.held = {
            "parameters": _bytes(parameters),
            "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
            "optimizer": _bytes(moments),
            "what the compressor keeps": _bytes([part for unit in units for part in unit.state.values()]),
        }


def _bytes(tensors):
    return sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in tensors)


def _trainer(case, devices, nodes=1):
    cls, options = CASES[case]
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=cls(**options),
        max_steps=_STEPS,
        use_distributed_sampler=False,
        precision="bf16-true" if case.endswith("bf16") else "32-true",
        **_QUIET,
    )


def _train(case):
    module, trainer = Watched(), _trainer(case, 4)
    trainer.fit(module, DataLoader(torch.randn(2 * _STEPS, 16), batch_size=2))
    traffic = trainer.strategy.traffic.take()
    return module.held, traffic.gradient_bytes() / _STEPS, traffic.parameter_bytes() / _STEPS, traffic.levels["inter"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_holds_and_sends_what_is_planned(four_ranks, case):
    found = planned(_trainer(case, 2, nodes=2), Module(), node_size=2)
    for held, gradients, parameters, inter in four_ranks.run(_train, case):
        near = 0.03 if case.startswith("fsdp1") else 1e-9  # FSDP1 lays parameters out by itself
        for name, value in held.items():
            assert found.held.get(name, 0) == pytest.approx(value, rel=near)
        assert found.sent["gradients"] == pytest.approx(gradients, rel=near)
        if case == "fsdp2, differences":  # the first gather is exact, of 4,324 parameters
            parameters = (_STEPS * parameters - 4 * 4324 * 3 / 4) / (_STEPS - 1)
        assert found.sent["parameters"] == pytest.approx(parameters, rel=near)
        if inter:  # parameters that are gathered among all ranks at once are of no level
            planned_inter = found.inter["gradients"] if case == "fsdp2, two hops" else sum(found.inter.values())
            assert planned_inter == pytest.approx(inter / _STEPS, rel=1e-9)
    assert not torch.distributed.is_initialized()


def test_what_leaves_a_node():
    trainer, module = _trainer("fsdp2", 2, nodes=2), Module()
    flat = planned(trainer, module, node_size=2)
    # codes for two of three others; parameters around a ring of which one of two edges leaves a node
    assert flat.inter["gradients"] == pytest.approx(flat.sent["gradients"] * 2 / 3)
    assert flat.inter["parameters"] == pytest.approx(flat.sent["parameters"] / 2)
    alone = planned(_trainer("fsdp2", 4), Module(), node_size=4)
    assert sum(alone.inter.values()) == 0 and alone.sent == flat.sent


def test_a_configuration_is_planned_for_many_nodes(capfd):
    tiny = ["--model.config", "{n_layer: 2, n_embd: 32, n_head: 2}", "--trainer.strategy.class_path", "CompressedFSDP2"]
    base = ["plan", "--config", str(ROOT / "configs/pretraining/gpt2_tiny.yaml"), "--world_size", "64"]
    assert command.main([*base, "--node_size", "8", "--json", "--", *tiny]) == 0
    told = json.loads(capfd.readouterr().out)["result"]
    # twelve 32² a block and 4096 + 128 rows of the embedding
    assert told["parameters"] == pytest.approx(2 * 12 * 32**2 + (4096 + 128) * 32, rel=0.02)
    assert told["held"]["parameters"] == pytest.approx(4 * told["parameters"] / 64, rel=0.15)  # 32 rows on 64 ranks
    assert told["intra"] + told["inter"] == pytest.approx(told["sent"]["total"])
    assert told["inter_of_a_node"] == 8 * told["inter"]


def test_one_rank_without_an_engine_holds_the_whole_model_and_sends_nothing(tmp_path, capfd):
    base, teacher = tmp_path / "base", tmp_path / "teacher"
    tokenizer = train_bpe(iter([["the quick brown fox jumps over the lazy dog " * 20]]), 300)
    for folder, sizes in ((base, {}), (teacher, {"intermediate_size": 96})):
        model = tiny(vocab_size=320, **sizes)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    whole = model.num_parameters() + tiny(vocab_size=320).num_parameters()
    given = ["--model.base", str(base), "--model.teacher", str(teacher), "--data.tokenizer", str(base)]
    words = ["plan", "--config", str(ROOT / "configs/structured_pruning/recover.yaml"), "--json", "--", *given]
    assert command.main(words) == 0
    told = json.loads(capfd.readouterr().out)["result"]
    assert told["parameters"] == whole + told["trained"] and 0 < told["trained"] < whole
    held = told["held"]
    assert (held["parameters"], held["gradients"]) == (4 * told["parameters"], 4 * told["trained"])
    assert held["optimizer"] == pytest.approx(8 * told["trained"], rel=0.01) and not told["sent"]["total"]


def test_impossible_shapes_are_refused_by_name(monkeypatch, capsys):
    with pytest.raises(ValueError, match="world_size=10 ranks do not fill nodes of node_size=4"):
        check_shape(10, 4)
    with pytest.raises(ValueError, match="at least 1"):
        check_shape(0, 1)
    with pytest.raises(ValueError, match="replicas=2 makes groups of 3 ranks, which would lie across nodes of 2"):
        planned(_trainer("ddp, two levels", 2, nodes=3), Module(), 2)
    with pytest.raises(ValueError, match="DDPStrategy cannot be planned"):
        planned(L.Trainer(accelerator="cpu", devices=2, strategy="ddp", **_QUIET), Module(), 1)
    recover = str(ROOT / "configs/structured_pruning/recover.yaml")
    monkeypatch.setattr("sys.argv", [str(ROOT / "bench/__main__.py")])  # as `python -m bench` has it
    with pytest.raises(SystemExit) as stop:
        command.main(["plan", "--config", recover, "--", "--model.base", "/nowhere"])
    assert stop.value.code == 2
    assert "no model folder at /nowhere" in (said := capsys.readouterr().err) and "help: main.py" in said
    with pytest.raises(FileNotFoundError, match="no file nowhere"):
        plan(Path("nowhere"), 8, 8, None, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"node_size=8, but the launcher .* LOCAL_WORLD_SIZE=4"):
        check_shape(16, 8)
    assert command.main(["plan", "--world_size", "8"]) == 1 and "--config" in capsys.readouterr().err
