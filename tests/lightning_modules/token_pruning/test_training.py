"""Stage 2 as a user runs it: only the scorers learn, and they learn what they are told."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import BertConfig

from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.loading import load
from lightning_modules.token_pruning import losses
from lightning_modules.token_pruning.evaluation import PruningQuality
from lightning_modules.token_pruning.module import TokenPruning
from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.quality.module import TokenQuality
from lightning_modules.token_pruning.saliency import TokenSaliency
from lightning_modules.token_pruning.samples import check_choice, check_data, split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.random import Random
from lightning_modules.token_pruning.soft_mask import Budget
from lightning_modules.token_pruning.targets.gate_gradient import GateGradient
from lightning_modules.token_pruning.targets.gradient_norm import GradientNorm
from tests.lightning_modules.token_pruning.models import LAYERS, on_disk, shared, tokens
from tests.lightning_modules.token_pruning.test_saliency import SCHEDULE, base, data  # noqa: F401 (fixtures)

LOSSES = ("lm", "mse", "ranking", "cross_entropy", "kl", "ratio")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13


@pytest.fixture(scope="module")
def saliency(base, data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("saliency") / "s"
    module = TokenSaliency(base, str(folder), SCHEDULE, GateGradient(), num_samples=1000, response=8)
    _trainer().predict(module, data)
    return str(folder)


def _trainer(**options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**quiet, **{"enable_checkpointing": False, **options})


def _module(base, tmp_path, **options):  # noqa: F811
    fast = {"network": MLP(32), "response": 8, "eval_keep": [0.5], "warmup_steps": 1, "learning_rate": 1e-2}
    return TokenPruning(base, SCHEDULE, str(tmp_path / "pruner"), **{**fast, **options})


def test_a_module_without_its_model_can_be_recorded(base, tmp_path):  # noqa: F811
    module = _module(base, tmp_path, mse_weight=0.0, ranking_weight=0.0)  # as `generate --show_survival` leaves it
    assert getattr(module, "model", None) is None and getattr(module, "parameter_count", None) is None


def test_only_the_scorers_learn_and_only_they_are_saved(base, data, saliency, tmp_path):  # noqa: F811
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, every_n_train_steps=3)
    module = _module(base, tmp_path, saliency=saliency, target=GateGradient(), kl_weight=1.0, ratio_weight=1.0)
    often = {"val_check_interval": 6, "check_val_every_n_epoch": None, "limit_val_batches": 2}
    trainer = _trainer(max_steps=6, callbacks=[checkpoint], enable_checkpointing=True, **often)
    trainer.fit(module, data)
    before = load(base).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.model.parameters())
    state = torch.load(checkpoint.last_model_path, weights_only=True)
    assert all(name.startswith("pruner.") for name in state["state_dict"])
    metrics = trainer.callback_metrics
    names = {"val/ppl", "val/ppl_learned_0_5", "val/ppl_random_0_5", "val/ppl_recency_0_5"}
    assert names | {"val/spearman_1", "val/spearman_3", "train/mse", "train/ranking", "train/kl"} <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())
    saved = TokenPruner.load(tmp_path / "pruner", module.model)
    hidden = torch.randn(1, 4, 64)
    assert torch.equal(saved(hidden, 3), module.pruner(hidden, 3))
    assert saved.notes["target"]["class"] == "GateGradient"
    again = _module(base, tmp_path, pruner=str(tmp_path / "pruner"), target=GateGradient())
    validated = _trainer(limit_val_batches=2)
    validated.validate(again, data, verbose=False)
    assert validated.callback_metrics["val/ppl_learned_0_5"] == metrics["val/ppl_learned_0_5"]
    validated.validate(again, data, verbose=False)
    assert validated.callback_metrics["val/ppl_learned_0_5"] == metrics["val/ppl_learned_0_5"]


@pytest.mark.parametrize(("loss", "through"), [("lm", True), ("kl", True), ("mse", False), ("ratio", False)])
def test_only_losses_of_the_model_run_all_of_it_and_are_sent_back(base, data, saliency, tmp_path, loss, through):  # noqa: F811
    weights = {f"{name}_weight": float(name == loss) for name in LOSSES}
    module = _module(base, tmp_path, saliency=saliency, **weights)
    _trainer(fast_dev_run=1, limit_val_batches=0).fit(module, data)
    ran = {}
    for index, layer in enumerate(module.model.get_decoder().layers):
        layer.register_forward_hook(
            lambda _, __, output, index=index: ran.update({index: ran.get(index, output.requires_grad)})
        )
    module.losses(split_batch(next(iter(data.train_dataloader())), 8))
    last = LAYERS - 1 if through else SCHEDULE.layers[-1]
    assert list(ran) == list(range(last + 1)) and ran[last] is through


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_alone_reaches_every_scorer_and_nothing_else(base, data, saliency, tmp_path, loss):  # noqa: F811
    weights = {f"{name}_weight": float(name == loss) for name in LOSSES}
    module = _module(base, tmp_path, saliency=saliency, **weights)
    trainer = _trainer(fast_dev_run=1, limit_val_batches=0)
    trainer.fit(module, data)
    module.zero_grad()
    samples = split_batch(next(iter(data.train_dataloader())), 8)
    parts = module.losses(samples)
    assert set(parts) == {loss}
    parts[loss].backward()
    for layer in ("1", "3"):
        assert all(p.grad.isfinite().all() for p in module.pruner.scorers[layer].parameters())
        assert any(p.grad.abs().sum() > 0 for p in module.pruner.scorers[layer].parameters())
    assert all(p.grad is None for p in module.model.parameters())


def test_supervision_teaches_the_order_of_saliency(base, data, saliency, tmp_path):  # noqa: F811
    L.seed_everything(0, verbose=False)
    module = _module(base, tmp_path, saliency=saliency, target=GateGradient(), lm_weight=0.0)
    trainer = _trainer(max_steps=60, limit_val_batches=3, val_check_interval=60, check_val_every_n_epoch=None)
    trainer.fit(module, data)
    found = trainer.callback_metrics
    assert found["val/spearman_1"] > 0.1 and found["val/spearman_3"] > 0.1  # 0 by chance
    # summed over two layers, scores that say nothing have a squared distance of 2 and a ranking loss of 2 log 2
    assert found["train/mse"] < 1.8 and found["train/ranking"] < 1.3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_base_model_may_be_in_half_precision(base, data, saliency, tmp_path, attention):  # noqa: F811
    """Scorers stay in float32; losses are those of the float32 model up to bfloat16's rounding."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        L.seed_everything(0, verbose=False)
        module = _module(base, tmp_path, saliency=saliency, kl_weight=1.0, dtype=dtype, attention=attention)
        trainer = _trainer(max_steps=3, limit_val_batches=2, val_check_interval=3, check_val_every_n_epoch=None)
        trainer.fit(module, data)
        assert module.model.dtype == getattr(torch, dtype) and module.model.config._attn_implementation == attention
        assert {p.dtype for p in module.pruner.parameters()} == {torch.float32}
        found[dtype] = trainer.callback_metrics
    for name in ("train/loss", "train/mse", "train/total", "val/loss"):
        torch.testing.assert_close(found["bfloat16"][name], found["float32"][name], rtol=0.03, atol=0.03)
    with pytest.raises(ValueError, match=r"model\.dtype: the base model is float16"):
        _trainer(max_steps=1).fit(_module(base, tmp_path, saliency=saliency, dtype="float16"), data)


def test_saliency_of_another_model_is_refused(base, data, saliency, tmp_path):  # noqa: F811
    other = load(base)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another base \(the values of \S+ are others \(\S+ is there, not"):
        _trainer(max_steps=1).fit(_module(str(tmp_path / "other"), tmp_path, saliency=saliency), data)


def test_text_in_another_models_tokens_is_refused_by_every_command(base, data, tmp_path):  # noqa: F811
    foreign = tmp_path / "foreign"
    load(base).save_pretrained(foreign)
    train_bpe(["a foreign language, of other words. "] * 50, 300).save_pretrained(foreign)
    module = _module(str(foreign), tmp_path, mse_weight=0.0, ranking_weight=0.0)
    saliency = TokenSaliency(str(foreign), str(tmp_path / "s"), SCHEDULE, GateGradient())
    quality = TokenQuality(str(foreign), SCHEDULE, [Random()])
    for run in (
        lambda: _trainer(max_steps=1, limit_val_batches=0).fit(module, data),
        lambda: _trainer().validate(module, data),
        lambda: _trainer().predict(saliency, data),
        lambda: quality.verify(data, torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=r"is not the one of .*/foreign"):
            run()


def _measured(rank=None):
    """What a rank finds where only the first has something to measure; without a rank the same alone."""
    quality, ids = PruningQuality([0.5]), tokens(2, 40)
    quality.expect(SCHEDULE.resolve(LAYERS))
    torch.manual_seed(0)
    pruner = TokenPruner(64, SCHEDULE.resolve(LAYERS), MLP(8))
    if not rank:
        with torch.no_grad():
            samples = split_batch({"input_ids": ids, "labels": ids}, 8)
            quality.update(shared(), pruner, SCHEDULE, GateGradient(), samples)
    return quality.compute()


def _measured_on_ranks():
    return _measured(dist.get_rank())


def test_a_rank_that_has_nothing_to_measure_takes_part(two_ranks):
    alone = _measured()
    assert {"val/ppl", "val/ppl_random_0_5", "val/spearman_3"} < set(alone)
    assert two_ranks.run(_measured_on_ranks) == [pytest.approx(alone, rel=1e-6)] * 2
    assert PruningQuality([0.5]).compute() == {}


def test_an_offloaded_model_validates_to_the_same_numbers(base, data, tmp_path):  # noqa: F811
    options = {"mse_weight": 0.0, "ranking_weight": 0.0, "pruner": str(tmp_path / "saved")}
    model = load(base)
    TokenPruner.for_model(model, SCHEDULE.resolve(LAYERS), network=MLP(32)).save(tmp_path / "saved")
    places = {"device_map": on_disk(), "offload_folder": str(tmp_path / "disk")}
    found = []
    for placed in ({}, places):
        module = _module(base, tmp_path, **options, **placed)
        found += _trainer().validate(module, data, verbose=False)
    assert module.model.device.type == "meta"  # it really is on disk
    del found[0]["val/ppl_random_0_5"], found[1]["val/ppl_random_0_5"]  # draws go on from run to run
    assert found[0] == found[1] and found[0]["val/ppl_learned_0_5"] > 0
    with pytest.raises(ValueError, match="device_map is for validate"):
        _trainer(max_steps=1).fit(_module(base, tmp_path, **options, **places), data)


def test_samples_without_saliency_train_on_the_loss_alone_and_are_reported(base, data, tmp_path):  # noqa: F811
    folder = str(tmp_path / "some")
    _trainer().predict(TokenSaliency(base, folder, SCHEDULE, GateGradient(), num_samples=8, response=8), data)
    module = _module(base, tmp_path, saliency=folder)
    with pytest.warns(UserWarning, match="% of the training samples had saliency"):
        _trainer(max_steps=2, limit_val_batches=0).fit(module, data)


def _fake(layers, prompt):
    """Saliency of one's own for every layer, and nothing else."""
    values = {
        layer: torch.randn(prompt.sum(1).max(), generator=torch.Generator().manual_seed(layer)) for layer in layers
    }
    return values, SimpleNamespace(get=lambda key: values)


def test_every_stage_is_taught_by_the_saliency_of_its_own_layer(base, data, saliency, tmp_path):  # noqa: F811
    module = _module(base, tmp_path, saliency=saliency)
    _trainer(fast_dev_run=1, limit_val_batches=0).fit(module, data)
    samples = split_batch(next(iter(data.train_dataloader())), 8)
    budget = Budget.of(SCHEDULE, LAYERS, samples.prompt)
    values, module.saliency = _fake(budget.stages, samples.prompt)
    everything = dict.fromkeys(budget.stages, torch.ones_like(samples.prompt))  # no stage dropped anything
    free = samples.prompt & ~budget.protected
    own, swapped = {}, {}
    for layer, other in zip(budget.stages, reversed(budget.stages), strict=True):
        whole = torch.zeros(samples.prompt.shape)
        for row, prompt in enumerate(samples.prompt):
            whole[row, prompt] = values[layer][: prompt.sum()]
        own[layer] = swapped[other] = losses.normalise(whole, free)
    told = module._score_losses(samples, budget, SimpleNamespace(scores=own, alive=everything))
    wrong = module._score_losses(samples, budget, SimpleNamespace(scores=swapped, alive=everything))
    assert told["mse"].item() == pytest.approx(0, abs=1e-9) and wrong["mse"] > 1
    assert wrong["ranking"] > told["ranking"]


def test_only_tokens_that_reached_a_stage_are_taught_there(base, data, saliency, tmp_path):  # noqa: F811
    module = _module(base, tmp_path, saliency=saliency)
    _trainer(fast_dev_run=1, limit_val_batches=0).fit(module, data)
    samples = split_batch(next(iter(data.train_dataloader())), 8)
    budget = Budget.of(SCHEDULE, LAYERS, samples.prompt)
    _, module.saliency = _fake(budget.stages, samples.prompt)
    first, second = budget.stages
    gone = (samples.prompt & ~budget.protected).long().argmax(1)  # the first free token of each row
    alive = torch.ones_like(samples.prompt).scatter(1, gone[:, None], False)
    found = []
    for value in (0.0, 1e3):
        scores = {first: torch.zeros(samples.prompt.shape), second: torch.zeros(samples.prompt.shape)}
        scores[second] = scores[second].scatter(1, gone[:, None], value)
        found.append(
            module._score_losses(samples, budget, SimpleNamespace(scores=scores, alive={first: alive, second: alive}))
        )
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("mse", "ratio"))


def test_noise_differs_from_step_to_step_and_follows_from_the_step_alone(base, data, tmp_path):  # noqa: F811
    class Noted(TokenPruning):
        def training_step(self, batch, batch_idx):
            torch.rand(self.trainer.global_step + self.spoilt)  # what ran before must not matter
            noise.append(torch.initial_seed())
            return super().training_step(batch, batch_idx)

    drawn = []
    for spoilt in (0, 3):
        noise: list[int] = []
        module = Noted(
            base, SCHEDULE, str(tmp_path / "p"), mse_weight=0.0, ranking_weight=0.0, network=MLP(8), response=8
        )
        module.spoilt = spoilt
        _trainer(max_steps=4, limit_val_batches=0).fit(module, data)
        drawn.append(noise)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def test_saliency_of_a_base_in_half_precision_trains_it_in_any(base, data, tmp_path):  # noqa: F811
    half = str(tmp_path / "half")
    load(base, dtype="bfloat16").save_pretrained(half)
    for source, dtype, count in ((base, "bfloat16", 8), (half, "float32", 1000)):
        # the second goes on where the first has stopped: rounded, the model is no other
        collect = TokenSaliency(source, str(tmp_path / "s"), SCHEDULE, GateGradient(), count, response=8, dtype=dtype)
        _trainer().predict(collect, data)
    for source, dtype in ((half, "auto"), (half, "float32"), (base, "float32")):
        module = _module(source, tmp_path, saliency=str(tmp_path / "s"), lm_weight=0.0, dtype=dtype, overwrite=True)
        trainer = _trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(module, data)
        assert module.model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
        assert trainer.callback_metrics["train/mse"] > 0
    with torch.no_grad():
        other = load(half)
        other.lm_head.weight[0, 0] = 9.0
    other.save_pretrained(tmp_path / "other")
    collect = TokenSaliency(str(tmp_path / "other"), str(tmp_path / "s"), SCHEDULE, GateGradient(), 8, response=8)
    with pytest.raises(ValueError, match=r"another base.*lm_head\.weight are others \(9 is there, not [-0.]"):
        _trainer().predict(collect, data)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_run_in_half_precision_yields_a_pruner_for_float32(base, data, saliency, tmp_path, precision):  # noqa: F811
    module = _module(base, tmp_path, saliency=saliency, target=GateGradient(), kl_weight=1.0, dtype="bfloat16")
    often = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 2}
    trainer = _trainer(max_steps=2, precision=precision, **often)
    trainer.fit(module, data)
    found = trainer.callback_metrics
    assert all(value.isfinite() for value in found.values())
    plain = _module(base, tmp_path, pruner=str(tmp_path / "pruner"))  # identity is compared up to rounding
    (wanted,) = _trainer(limit_val_batches=2).validate(plain, data, verbose=False)
    assert found["val/ppl"] == pytest.approx(wanted["val/ppl"], rel=0.02)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"schedule": Schedule(layers=[LAYERS - 1])}, "nothing is left to skip"),
        ({"pruner": "saved", "schedule": Schedule(layers=[2])}, "scores layers"),
        ({"pruner": "nowhere"}, "nowhere"),
        ({"pruner": "saved", "network": MLP(9)}, r"network: the scorers of saved are MLP\(width=8\)"),
        ({"pruner": "saved", "ranking_weight": 1.0}, "ranking_weight and cross_entropy_weight need saliency"),
        ({"saliency": "nowhere"}, "collect saliency first"),
        ({"device_map": "auto"}, "device_map is for validate"),
        ({"attention": "flash_attention_2"}, "must take masks"),
        ({"output": "thesis"}, "thesis"),
        ({"output": "base"}, "output"),
        ({"base": "nowhere/at/all"}, "nowhere/at/all"),
        ({"base": "bert"}, "does not know 'bert'"),
    ],
)
def test_what_does_not_go_together_is_found_before_weights_are_read(options, names, base, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").touch()
    for name, config in (("base", load(base).config), ("bert", BertConfig())):
        config.save_pretrained(name)  # without weights
    TokenPruner(64, SCHEDULE.resolve(LAYERS), MLP(8)).save("saved")
    given = {"base": "base", "schedule": SCHEDULE, "output": "out", "mse_weight": 0.0, "ranking_weight": 0.0, **options}
    module = TokenPruning(**given)
    with pytest.raises((ValueError, FileNotFoundError), match=names):
        module.check_arguments("fit", data)
    assert module.pruner is None and sorted(p.name for p in Path("thesis").iterdir()) == ["chapter1.tex"]


def test_a_foreign_folder_is_replaced_when_that_is_allowed(base, data, tmp_path):  # noqa: F811
    (tmp_path / "pruner").mkdir()
    (tmp_path / "pruner/old.tex").touch()
    alone = {"mse_weight": 0.0, "ranking_weight": 0.0}
    with pytest.raises(ValueError, match=r"model\.output: .*overwrite"):
        _module(base, tmp_path, **alone).check_arguments("fit", data)
    module = _module(base, tmp_path, **alone, overwrite=True)
    module.check_arguments("fit", data)
    _trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    assert TokenPruner.load(tmp_path / "pruner", module.model).layers == (1, 3)
    with pytest.raises(ValueError, match="is the input"):  # that is never allowed
        TokenPruning(base, SCHEDULE, base, **alone, overwrite=True).check_arguments("fit", data)


def test_a_tilde_is_the_home_folder(base, data, saliency, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s").symlink_to(saliency)
    TokenPruner(64, SCHEDULE.resolve(LAYERS), MLP(8)).save("~/saved")
    module = TokenPruning(base, SCHEDULE, "~/out", pruner="~/saved", saliency="~/s", offload_folder="~/disk")
    assert module.output == tmp_path / "out" and module.loading["offload_folder"] == str(tmp_path / "disk")
    module.check_arguments("fit", data)
    module.configure_model()
    assert module.pruner.layers == (1, 3)


def test_what_goes_together_is_let_through(base, data, saliency, tmp_path):  # noqa: F811
    _module(base, tmp_path, saliency=saliency).check_arguments("fit", data)
    _module(base, tmp_path, saliency=saliency, device_map="auto").check_arguments("validate", data)
    TokenSaliency(base, saliency, SCHEDULE, GateGradient()).check_arguments("predict", data)
    with pytest.raises(ValueError, match="another target"):
        TokenSaliency(base, saliency, SCHEDULE, GradientNorm()).check_arguments("predict", data)
    with pytest.raises(ValueError, match="another layers"):
        TokenSaliency(base, saliency, Schedule(layers=[2]), GateGradient()).check_arguments("predict", data)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "need saliency"),
        ({"lm_weight": -1.0}, "weights"),
        ({"lm_weight": 0.0, "mse_weight": 0.0, "ranking_weight": 0.0}, "weights"),
        ({"temperature": 0.0, "saliency": "s"}, "temperature"),
        ({"eval_keep": [0.5, 0.0], "saliency": "s"}, r"eval_keep within .* and \[0\.5, 0\.0\]"),
        ({"eval_keep": [70], "saliency": "s"}, "eval_keep"),
        ({"warmup_steps": -1, "saliency": "s"}, "warmup_steps"),
    ],
)
def test_what_is_wrong_is_named(options, names, tmp_path):
    with pytest.raises(ValueError, match=names):
        _module("base", tmp_path, **options)


def test_data_that_does_not_fit_is_refused(base, data, saliency):  # noqa: F811
    with pytest.raises(ValueError, match="another layers"):
        _trainer(max_steps=1).fit(TokenPruning(base, Schedule(layers=[2]), saliency=saliency), data)
    config = SimpleNamespace(max_position_embeddings=16)
    with pytest.raises(ValueError, match="exceeds the 16 positions"):
        check_data(data, config)
    with pytest.raises(ValueError, match="packing"):
        check_data(SimpleNamespace(packing=True), config)
    config, short = SimpleNamespace(num_hidden_layers=6), SimpleNamespace(block_size=60)
    with pytest.raises(ValueError, match=r"schedule: of a prompt of 60 tokens the stages after layers \[1\] keep only"):
        check_choice(Schedule(layers=[1], keep=0.5, of="prompt"), short, config)
    with pytest.warns(UserWarning, match=r"layers \[3\] keep only"):
        check_choice(Schedule(layers=[1, 3], keep=[0.9, 0.5], of="prompt"), short, config)
