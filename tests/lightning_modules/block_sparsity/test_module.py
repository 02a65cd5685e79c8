"""Masks through real training, on a tiny Llama and made-up text."""

import json
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks import HFExport, TierSchedule
from lightning_modules.block_sparsity.layer_files import layer_folder
from lightning_modules.block_sparsity.lora import add_adapters, merge_masked
from lightning_modules.block_sparsity.masks import mask_weights, violations
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.block_sparsity.restarts import Restarts
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from lightning_modules.block_sparsity.scores.gradient import Gradient
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.scores.random import Random
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.updates.obs import Obs
from lightning_modules.data.instruct import InstructData
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.frozen import Frozen
from tests.lightning_modules.block_sparsity.runs import SCHEDULE, data_of, fit, module_of
from tests.lightning_modules.block_sparsity.toy import batches, tiny_llama
from tests.lightning_modules.data.toy import Toy

CPU = torch.device("cpu")


def test_all_iterations_in_one_fit_hold_the_masks_and_leave_a_record(fitted, dense):
    module, block, folder = fitted
    assert [entry["iteration"] for entry in block["iterations"]] == [1, 2, 3]
    assert [entry["violations"] for entry in block["iterations"]] == [0, 0, 0]
    zeros = [entry["sparsity"] for entry in block["iterations"]]
    assert zeros == sorted(zeros) and zeros[-1] == pytest.approx(0.2 + 0.3 * (1 - 6 / 64), abs=0.03)
    assert all(entry["ppl"] > 1 for entry in block["iterations"])
    for matrix in block["matrices"]:
        assert sum(matrix[tier] for tier in ("dense", "mid_2_4", "topk")) == matrix["rows"] * matrix["columns"]
    assert {len(q) for q in block["quantiles"].values()} == {5}
    saved = AutoModelForCausalLM.from_pretrained(folder / "out")
    before = AutoModelForCausalLM.from_pretrained(dense)
    for name, keep in module.pruner.keep.items():
        weight = saved.get_submodule(name).weight
        assert (weight[~keep] == 0).all() and (weight[keep] != before.get_submodule(name).weight[keep]).any()


def test_a_run_that_was_killed_while_it_saved_has_its_result_when_resumed(fitted, dense, data_cache, tmp_path):
    _, block, folder = fitted
    last = max((folder / "ckpt").iterdir(), key=lambda path: path.stat().st_mtime)
    again = fit(module_of(dense, tmp_path / "out"), data_cache, tmp_path, ckpt=str(last))
    assert again["matrices"] == block["matrices"] and again["iterations"] == block["iterations"]


def test_a_run_resumed_between_iterations_ends_the_same(fitted, dense, data_cache, tmp_path):
    _, block, folder = fitted
    again = module_of(dense, tmp_path / "out")
    resumed = fit(again, data_cache, tmp_path, ckpt=str(folder / "ckpt/epoch=0.ckpt"))
    assert resumed["matrices"] == block["matrices"] and resumed["iterations"] == block["iterations"]
    assert resumed["quantiles"] == block["quantiles"]


def test_one_iteration_goes_on_from_a_saved_model_and_its_maps(fitted, dense, data_cache, tmp_path):
    first = fit(module_of(dense, tmp_path / "1", iteration=1), data_cache, tmp_path / "a")
    second = module_of(tmp_path / "1", tmp_path / "2", iteration=2)
    block = fit(second, data_cache, tmp_path / "b")
    before = module_of(tmp_path / "1", tmp_path / "x")
    before.configure_model()
    assert before.pruner.counts() == first["matrices"] != block["matrices"]
    for name, tiers in second.pruner.tiers.items():
        assert (tiers.map_rc >= before.pruner.tiers[name].map_rc).all()
    assert [e["iteration"] for e in block["iterations"]] == [2]
    with pytest.raises(ValueError, match="un-demote"):
        fit(module_of(tmp_path / "2", tmp_path / "3", iteration=1), data_cache, tmp_path / "c")
    assert (tmp_path / "2/model.safetensors").is_file() and not (tmp_path / "3").exists()


def test_lora_merges_only_where_weights_are_kept(dense, data_cache, tmp_path):
    module = module_of(
        dense, tmp_path / "out", finetune="lora", schedule=LinearSchedule(**{**SCHEDULE, "iterations": 2})
    )
    block = fit(module, data_cache, tmp_path, callbacks=[HFExport(str(tmp_path / "exported"))])
    assert [entry["violations"] for entry in block["iterations"]] == [0, 0]
    exported = load_file(tmp_path / "exported/model.safetensors")
    for name, weight in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(exported[name], weight)
    saved, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", dense))
    changed = 0
    for name, keep in module.pruner.keep.items():
        weight = saved.get_submodule(name).weight
        assert (weight[~keep] == 0).all()
        changed += int((weight != before.get_submodule(name).weight)[keep].sum())
    assert changed > 1000
    ids = batches(1)[0]["input_ids"]
    torch.testing.assert_close(saved(input_ids=ids).logits, module.plain_model.eval()(input_ids=ids).logits)


def test_masks_follow_the_adapters_to_their_device(monkeypatch):
    model = tiny_llama()
    pruner, masked = Pruner(model, block=8, k=6), torch.Tensor.masked_fill_
    adapted = add_adapters(model, pruner.matrices, 2).to("meta")

    def on_one_device(values, mask, value):  # as every device but this one asks for
        assert mask.device == values.device
        return masked(values, mask, value)

    monkeypatch.setattr(torch.Tensor, "masked_fill_", on_one_device)
    assert len(merge_masked(adapted.get_base_model(), pruner.keep)) == 2 * len(pruner.keep)


def test_without_the_masks_training_does_bring_zeros_back(fitted, dense, data_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.block_sparsity.module.mask_gradients", lambda *_: None)
    module = module_of(dense, tmp_path / "out")
    monkeypatch.setattr(module, "optimizer_step", lambda *a, **k: L.LightningModule.optimizer_step(module, *a, **k))
    with pytest.raises(RuntimeError, match="pruned weights are not zero after epoch 0"):
        fit(module, data_cache, tmp_path)


def test_every_iteration_has_the_learning_rate_of_a_run_of_its_own(dense, data_cache, tmp_path):
    class Rates(L.Callback):
        def __init__(self):
            self.rates, self.moments = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.moments.append(len(trainer.optimizers[0].state))

    schedule = LinearSchedule(**{**SCHEDULE, "iterations": 2, "epochs": 2})
    options = {"warmup_steps": 2, "schedule": schedule, "iteration_lr_factor": 0.5}
    whole, alone = Rates(), Rates()
    fit(module_of(dense, tmp_path / "out", **options), data_cache, tmp_path, steps=3, callbacks=[whole])
    fit(module_of(dense, tmp_path / "one", **options, iteration=1), data_cache, tmp_path / "b", callbacks=[alone])
    assert whole.rates[:6] == alone.rates and max(alone.rates) == 1e-2 and alone.rates[0] == 0
    assert whole.rates[6:] == pytest.approx([rate / 2 for rate in alone.rates])
    assert whole.moments[6] == 0 < whole.moments[7]
    resumed = Rates()
    ckpt = str(tmp_path / "ckpt/epoch=2.ckpt")
    fit(module_of(dense, tmp_path / "again", **options), data_cache, tmp_path / "c", ckpt=ckpt, callbacks=[resumed])
    assert resumed.rates == whole.rates[9:]


def test_a_run_is_not_resumed_under_another_schedule(fitted, dense, data_cache, tmp_path):
    ckpt = str(fitted[2] / "ckpt/epoch=0.ckpt")
    for change in ({"dense": 0.2, "mid_2_4": 0.5}, {"epochs": 2}, {"iterations": 4}):
        module = module_of(dense, tmp_path / "out", schedule=LinearSchedule(**{**SCHEDULE, **change}))
        with pytest.raises(
            ValueError, match=r"model\.schedule: the checkpoint is of a run with 3 iterations, \d of dense"
        ):
            fit(module, data_cache, tmp_path, ckpt=ckpt)


def test_a_resumed_run_has_the_learning_rates_that_it_asks_for():
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    before, after = (
        LambdaLR(torch.optim.SGD(parameter), Restarts(*how)) for how in (("cosine", 2, 8), ("linear", 0, 9))
    )
    before.lr_lambdas[0].start(5, 8, 0.5)
    after.load_state_dict(before.state_dict())
    wanted = Restarts("linear", 0, 9)
    wanted.start(5, 8, 0.5)
    assert [after.lr_lambdas[0](step) for step in range(5, 13)] == [wanted(step) for step in range(5, 13)]


def test_a_schedule_that_cannot_start_again_is_refused(dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match="lr_schedule reduce_lr_on_plateau"):
        fit(module_of(dense, tmp_path / "out", lr_schedule="reduce_lr_on_plateau"), data_cache, tmp_path)


def _fit_a_rank(dense, folder, cache):
    """One of two ranks that would each prune something else; its masks and one matrix."""
    warnings.simplefilter("ignore")
    rank = torch.distributed.get_rank()
    module = module_of(dense, folder / "out", score=Random(seed=rank), update=Obs(), iteration=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=-1,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[TierSchedule()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=Toy(cache_dir=cache, max_val_blocks=8))
    keep = {name: mask.clone() for name, mask in module.pruner.keep.items()}
    return keep, module.plain_model.get_submodule(next(iter(keep))).weight.detach().clone()


def test_ranks_agree_on_masks_and_values(dense, data_cache, tmp_path, two_ranks):
    data_of(data_cache)
    (mine, weight), (other, others) = two_ranks.run(_fit_a_rank, dense, tmp_path, data_cache)
    assert all(torch.equal(mask, other[name]) for name, mask in mine.items())
    assert torch.equal(weight, others) and not all(mask.all() for mask in mine.values())


def test_weights_that_stay_are_updated_and_finished_layers_are_gone_in_the_end(dense, data_cache, tmp_path):
    data, ppl = data_of(data_cache), {}
    for name, update in {"plain": None, "updated": Obs()}.items():
        module = module_of(dense, tmp_path / name, update=update, score=Magnitude())
        ppl[name] = module.prune(data, CPU)["val_ppl"]
        assert module.check_masks("afterwards") == 0
        assert not layer_folder(tmp_path / name).exists()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ppl]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_patience_ends_iterations_early_and_the_learning_rate_follows(dense, data_cache, tmp_path):
    schedule = LinearSchedule(**{**SCHEDULE, "iterations": 2, "epochs": 5})
    options = {"schedule": schedule, "learning_rate": 1e-9, "iteration_lr_factor": 0.5, "lr_schedule": "constant"}
    module = module_of(dense, tmp_path / "out", **options)
    block = fit(module, data_cache, tmp_path, patience=1, steps=1)
    assert [entry["iteration"] for entry in block["iterations"]] == [1, 2]
    assert module.trainer.current_epoch < 8
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-10)


def test_patience_counts_validations_not_epochs(dense, data_cache, tmp_path):
    schedule = LinearSchedule(**{**SCHEDULE, "iterations": 1, "epochs": 6})
    module = module_of(dense, tmp_path / "out", schedule=schedule, learning_rate=1e-9)
    block = fit(module, data_cache, tmp_path, patience=2, steps=1, check_val_every_n_epoch=2)
    assert module.trainer.current_epoch == 6  # three validations, two of them no better
    assert block["iterations"][0]["ppl"] is not None


def test_training_that_would_prune_and_save_nothing_is_refused(dense, data_cache, tmp_path):
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.callbacks: .*TierSchedule"):
        trainer.fit(module_of(dense, tmp_path / "out"), datamodule=data_of(data_cache))


def test_a_trial_of_a_run_leaves_nothing(dense, data_cache, tmp_path):
    fit(module_of(dense, tmp_path / "run/out"), data_cache, tmp_path / "fit", steps=1, fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_the_teacher_is_no_part_of_the_module(dense, data_cache, tmp_path):
    module = module_of(dense, tmp_path / "out", teacher=str(dense), iteration=1)
    fit(module, data_cache, tmp_path, steps=1)
    assert not any("teacher" in name for name, _ in module.named_parameters())


def test_a_teacher_of_other_tokens_is_refused_before_anything_is_loaded(dense, data_cache, tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(dense)
    config.vocab_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "larger")
    monkeypatch.setattr("lightning_modules.block_sparsity.module.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"model\.teacher: its vocabulary has 328 tokens, the model's has 320"):
        fit(module_of(dense, tmp_path / "out", teacher=str(tmp_path / "larger")), data_cache, tmp_path)
    tiny_llama().save_pretrained(tmp_path / "other")
    train_bpe(["another text of other words, and nothing else at all " * 20], 300).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="tokenizer"):
        module_of(dense, tmp_path / "out", teacher=str(tmp_path / "other")).check_arguments("fit", data_of(data_cache))


def test_violations_are_counted_nan_included():
    model = tiny_llama()
    pruner = Pruner(model, block=8, k=6)
    name, keep = next(iter(pruner.keep.items()))
    keep[0, :5] = False
    mask_weights(pruner.matrices, pruner.keep)
    assert violations(pruner.matrices, pruner.keep) == 0
    with torch.no_grad():
        pruner.matrices[name].weight[0, 0], pruner.matrices[name].weight[0, 3] = 1e-30, torch.nan
    assert violations(pruner.matrices, pruner.keep) == 2


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_teacher_has_its_share_of_the_loss_and_the_text_the_rest(share, dense, tmp_path, monkeypatch):
    module = module_of(dense, tmp_path / "out", distill_weight=share)
    module.configure_model()
    teacher, batch = tiny_llama(seed=1), batches(1)[0]
    module._teacher = Frozen(teacher)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    found = module.training_step(batch, 0)["loss"]
    mine, other = (m(input_ids=batch["input_ids"]).logits for m in (module.model, teacher))
    text = F.cross_entropy(mine[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    distance = F.kl_div(
        *(s[:, :-1].flatten(0, 1).log_softmax(-1) for s in (mine, other)), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(found, (1 - share) * text + share * distance)
    assert abs(text - distance) > 0.5


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("score", [Wanda(), Gradient()], ids=repr)
def test_instructions_prune_and_fine_tune_as_text_does(score, packing, dense, data_cache, tmp_path):
    tokenizer = data_of(data_cache).tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [{"instruction": f"Say {i}.", "input": "", "output": "the one red " * (1 + i % 4)} for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sizes = {"max_length": 64, "batch_size": 4, "packing": packing, "cache_dir": str(tmp_path / "cache")}
    data = InstructData(str(tmp_path / "chats.jsonl"), str(tmp_path / "tokenizer"), **sizes, padding_side="left")
    options = {"score": score, "reconstruction_steps": 1, "teacher": str(dense), "iteration": 1}
    tiers = fit(module_of(dense, tmp_path / "out", **options), data_cache, tmp_path / "fit", steps=1, data=data)
    assert tiers["iterations"][0]["violations"] == 0 and tiers["sparsity"] > 0.1


def test_a_run_that_is_stopped_early_says_how_far_the_saved_model_is_pruned(dense, data_cache, tmp_path, monkeypatch):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    said = []
    monkeypatch.setattr("callbacks.tier_schedule.rank_zero_warn", said.append)
    fit(module_of(dense, tmp_path / "out"), data_cache, tmp_path, callbacks=[Stop()])
    assert said == ["stopped after iteration 1 of 3: what is saved is that far pruned"]
    assert (tmp_path / "out/model.safetensors").is_file()
