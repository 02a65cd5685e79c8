"""Models built with this rank's rows alone are those that are built whole, bit for bit; on gloo ranks."""

import weakref

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from strategies import CompressedFSDP, CompressedFSDP2
from strategies.compressors import Int8
from strategies.sharded_start import ShardedStart
from tests.strategies.engines import whole

_TINY = {"vocab_size": 67, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3}
CONFIGS = {
    "gpt2": {"n_layer": 2, "n_embd": 12, "n_head": 2, "n_positions": 16, **_TINY},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 22,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **_TINY,
    },
}
ENGINES = {"fsdp1": CompressedFSDP, "fsdp2": CompressedFSDP2}


def _build(kind, folder=None):
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))


class Module(L.LightningModule):
    def __init__(self, kind, folder=None):
        super().__init__()
        self.kind, self.folder, self.model, self.seen = kind, folder, None, {}

    def configure_model(self):
        if self.model is None:
            torch.manual_seed(3)
            self.model = _build(self.kind, self.folder)
            built = self.trainer.strategy._built
            self.seen = {
                "devices": {p.device.type for p in self.model.parameters()},
                "share": 0 if built is None else built.held / sum(p.nbytes for p in self.model.parameters()),
                "next": torch.rand(1).item(),  # what is drawn afterwards
            }

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(engine, kind, folder=None, steps=2, start="sharded", **options):
    module = Module(kind, folder)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    strategy = ENGINES[engine](compressor=Int8(16), start=start, **options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_steps=steps,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(module, torch.randint(0, 67, (4, 2, 8), generator=torch.Generator().manual_seed(0)))
    if engine == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        with FSDP.summon_full_params(strategy.model):
            weights = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    else:
        weights = {n: whole(p.detach()).clone() for n, p in module.model.named_parameters()}
    buffers = {n: b.clone() for n, b in module.model.named_buffers()}
    module.seen["left"] = 0 if strategy._built is None else strategy._built.held
    return module.seen, weights, buffers


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_random_weights_are_those_of_a_whole_start(engine, kind, three_ranks):
    sharded, started_whole = (three_ranks.run(_fit, engine, kind, start=start) for start in ("sharded", "whole"))
    for (seen, weights, buffers), (other, expected, kept) in zip(sharded, started_whole, strict=True):
        assert seen["devices"] == {"meta"} and other["devices"] == {"cpu"}
        assert 0 < seen["share"] < 0.6 and seen["next"] == other["next"]
        assert seen["left"] == 0  # once the engine has the model
        assert weights.keys() == expected.keys() and buffers.keys() == kept.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        assert all(torch.equal(buffer, kept[name]) for name, buffer in buffers.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_is_read_is_the_one_on_disk(engine, three_ranks, tmp_path):
    torch.manual_seed(0)
    model = _build("llama")
    model.save_pretrained(tmp_path)
    for seen, weights, _ in three_ranks.run(_fit, engine, "llama", str(tmp_path), steps=0):
        assert seen["devices"] == {"meta"}
        names = {name.replace("_fsdp_wrapped_module.", ""): weight for name, weight in weights.items()}
        assert all(torch.equal(names[name], p) for name, p in model.named_parameters())


def test_two_levels_keep_the_rows_of_their_replica(four_ranks):
    sharded, expected = (
        four_ranks.run(_fit, "fsdp2", "gpt2", start=start, replicas=2)[1][1] for start in ("sharded", "whole")
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in sharded.items())


def _built(make, rank=1, ranks=3):
    torch.manual_seed(0)
    start = ShardedStart(rank, ranks)
    with start.building():
        module = make()
    return start, module


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4, padding_idx=5)
        self.scale = nn.Parameter(torch.full((7,), 3.0))
        nn.init.trunc_normal_(self.embedding.weight, std=0.5)
        self.mixed = nn.Parameter(torch.empty(5, 3))
        nn.init.orthogonal_(self.mixed)
        with torch.no_grad():
            self.embedding.weight[5].zero_()
            self.scale.mul_(2)


def test_rows_are_those_of_the_whole_tensor():
    torch.manual_seed(0)
    expected = Padded()
    for rank in range(3):
        start, module = _built(Padded, rank)
        for part, name, size in (
            (module.embedding, "weight", 4),
            (module, "scale", 3),
            (module, "mixed", 2),
        ):
            rows = start._kept[part, name].rows
            origin = expected.embedding if name == "weight" else expected
            assert torch.equal(rows, getattr(origin, name)[rank * size : (rank + 1) * size])
            assert getattr(part, name).device.type == "meta"


def test_whole_parameters_are_gathered_where_the_engine_is_and_held_by_their_modules_alone(monkeypatch):
    gathered = []
    monkeypatch.setattr(dist, "all_gather", lambda every, own, group: gathered.extend([*every, own]))
    start, module = _built(lambda: nn.Linear(4, 7))
    fill = start.fill_whole(torch.device("meta"), None)  # any device that is not the rows' own
    fill(module)
    assert {tensor.device.type for tensor in gathered} == {module.weight.device.type} == {"meta"}
    assert module.weight.shape == (7, 4) and gathered[0].shape == (3, 4)
    held = weakref.ref(module.weight)
    del module.weight  # as FSDP1 does when it has put a unit together
    assert held() is None


def test_values_that_need_all_of_a_parameter_are_refused_with_the_fix():
    def summed():
        weight = nn.Linear(4, 4).weight
        with torch.no_grad():
            weight.cumsum_(0)

    def read():
        return nn.Linear(4, 4).weight.cpu()

    for build in (summed, read):
        with pytest.raises(ValueError, match="start whole"):
            _built(build)


def test_only_modules_that_say_so_start_so_by_themselves():
    class Knows(L.LightningModule):
        starts_sharded = True

    for module, expected in ((Knows(), True), (L.LightningModule(), False)):
        strategy = CompressedFSDP2()
        strategy._lightning_module = module
        with strategy._building(0, 2):
            pass
        assert (strategy._built is not None) is expected
