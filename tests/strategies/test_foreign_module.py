"""Someone else's LightningModule under every engine: no Hugging Face model, frozen parameters, manual optimization."""

import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.utils.data import DataLoader, TensorDataset

from strategies.compressors import ErrorFeedback, Int8, NoCompressionA2A, OneBit
from tests.strategies.engines import ENGINES

by_engine = pytest.mark.parametrize("engine", ENGINES)


class Layer(nn.Module):
    """A frozen projection and a trained one, as adapters have it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return x + torch.relu(self.base(x) + self.adapter(x))


class Foreign(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.embed = nn.Embedding(11, 16).requires_grad_(False)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(16, 11)
        self.losses: dict[str, list[float]] = {"fit": [], "validate": [], "test": []}

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)

    def _loss(self, batch, stage):
        (ids,) = batch
        logits = type(self).forward(self, ids[:, :-1])  # as from a method of one's own: past the root's forward
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.losses[stage].append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for half in batch[0].chunk(2):
            optimizer.zero_grad()
            self.manual_backward(self._loss([half], "fit"))
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self._loss(batch, "validate")

    def test_step(self, batch, batch_idx):
        self._loss(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.5)


TRAINED = 2 * 16 * 16 + 16 * 11 + 11


def _trainer(engine, compressor, max_epochs=2, **options):
    warnings.simplefilter("ignore")
    return L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=ENGINES[engine](compressor=compressor, **options),
        max_epochs=max_epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def _batches():
    draw = torch.Generator().manual_seed(dist.get_rank())
    return DataLoader(TensorDataset(torch.randint(11, (8, 9), generator=draw)), batch_size=4)


def _every_stage(engine):
    trainer, module, data = _trainer(engine, ErrorFeedback(Int8())), Foreign(), _batches()
    trainer.fit(module, data)
    before = list(module.losses["fit"])
    trainer.validate(module, data)
    trainer.test(module, data)
    predictions = trainer.predict(module, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    straight = Foreign()
    _trainer(engine, ErrorFeedback(Int8()), max_epochs=3).fit(straight, data)
    return before, module.losses, torch.cat(predictions).shape, straight.losses["fit"]


@by_engine
def test_one_trainer_goes_through_every_stage_and_back(engine, two_ranks):
    for before, losses, predicted, straight in two_ranks.run(_every_stage, engine):
        assert losses["validate"] == losses["test"]  # the same data, the same weights
        assert max(losses["validate"]) < before[0] and predicted == (8, 9)
        assert len(before) == 8 and losses["fit"] == straight  # bit for bit: what is owed lives through all stages


def _resumed(engine, path):
    """Losses after a checkpoint that owes nothing, of a Trainer that owed something before, and of a new one."""
    plain = _trainer(engine, Int8(), max_epochs=1)
    plain.fit(Foreign(), _batches())
    plain.save_checkpoint(path)
    used, losses = _trainer(engine, ErrorFeedback(OneBit()), max_epochs=1), []
    used.fit(module := Foreign(), _batches())
    module.losses["fit"].clear()
    used.fit_loop.max_epochs = 2
    fresh = _trainer(engine, ErrorFeedback(OneBit()))
    for trainer, model in ((used, module), (fresh, Foreign())):
        trainer.fit(model, _batches(), ckpt_path=path)
        losses.append(model.losses["fit"])
    return losses


@by_engine
def test_a_checkpoint_that_is_loaded_settles_what_was_owed_before(engine, two_ranks, tmp_path):
    for used, fresh in two_ranks.run(_resumed, engine, str(tmp_path / "last.ckpt")):
        assert len(fresh) == 4 and used == fresh


def _gathered(engine):
    trainer, module, data = _trainer(engine, Int8(), max_epochs=1), Foreign(), _batches()
    sent = []
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, data)
        sent.append(trainer.strategy.traffic.take().parameter_bytes())
        trainer.validate(module, data)
        trainer.strategy.traffic.take()
    return sent


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_gathers_are_counted_once_in_every_stage(engine, two_ranks):
    for first, second in two_ranks.run(_gathered, engine):
        assert second > 0 and first - second in (0, 4 * 11 * 16 // 2)  # FSDP1's root stays gathered after validation


def _run(engine, module=None, **options):
    trainer, module = _trainer(engine, NoCompressionA2A(), max_epochs=1, **options), module or Foreign()
    trainer.fit(module, _batches())
    units = {unit.name: unit.valid_numel for unit in trainer.strategy.units}
    return trainer.strategy.traffic.take(), units, trainer.global_step, module.losses["fit"]


@by_engine
def test_only_what_is_trained_is_sent_and_counted_against(engine, two_ranks):
    traffic, units, steps, losses = two_ranks.run(_run, engine)[0]
    assert sum(units.values()) == TRAINED
    passes = 2 if engine == "ddp" else 1
    needed = passes * 4 * TRAINED / 2 * steps
    assert needed <= sum(traffic.ideal.values()) <= traffic.gradient_bytes() < 1.05 * needed  # padding
    assert losses == pytest.approx(two_ranks.run(_run, "ddp")[0][3], rel=1e-5)


def test_trained_modules_among_frozen_ones_are_units_of_their_own_under_fsdp1(two_ranks):
    _, units, *_ = two_ranks.run(_run, "fsdp1")[0]
    assert units == {"layers.0.adapter": 256, "layers.1.adapter": 256, "head": 16 * 11 + 11}


def test_a_models_own_blocks_can_be_asked_for(two_ranks):
    for engine in ("fsdp1", "fsdp2"):
        _, units, *_ = two_ranks.run(_run, engine, auto_wrap_policy={nn.Linear})[0]
        assert set(units) >= {"layers.0.adapter", "layers.1.adapter", "head"}


class Scaled(Foreign):
    """Its one trained parameter belongs to the module that holds the frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, ids):
        return self.head(self.embed(ids) * self.scale)


def _refusal(engine, module, **options):
    try:
        _run(engine, module, **options)
    except ValueError as refusal:
        return str(refusal)
    return "accepted"


def test_what_fsdp1_cannot_keep_apart_is_refused_with_the_fix(two_ranks):
    assert all("scale is trained" in m and "CompressedFSDP2" in m for m in two_ranks.run(_refusal, "fsdp1", Scaled()))
    assert two_ranks.run(_refusal, "fsdp2", Scaled()) == ["accepted"] * 2
    whole = partial(size_based_auto_wrap_policy, min_num_params=1 << 30)
    messages = two_ranks.run(_refusal, "fsdp1", Foreign(), auto_wrap_policy=whole)
    assert all("layers.0.adapter" in m and "CompressedFSDP2" in m for m in messages)
