"""Masks through real training, and the commands around it, on a tiny Llama and made-up text."""

import json
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from callbacks import TierSchedule
from common.manifest import DamagedError
from common.records.schema import TIERS
from lightning_modules.block_sparsity import BlockSparsity, load_packed, verification
from lightning_modules.block_sparsity import module as block_module
from lightning_modules.block_sparsity.layer_files import layer_folder
from lightning_modules.block_sparsity.masks import mask_weights, violations
from lightning_modules.block_sparsity.pruner import TIERS_FILE, Pruner
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from lightning_modules.block_sparsity.scores.gradient import Gradient
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.scores.random import Random
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.updates.obs import Obs
from lightning_modules.data.instruct import InstructData
from lightning_modules.frozen import Frozen
from tests.lightning_modules.block_sparsity.toy import batches, prune, save_tiny, tiny_llama
from tests.lightning_modules.data.toy import Toy

CPU = torch.device("cpu")
SIZES = {"block": 8, "topk": 6, "calibration_blocks": 4, "warmup_steps": 0, "learning_rate": 1e-2}
SCHEDULE = {"iterations": 3, "dense": 0.3, "mid_2_4": 0.4, "topk": 0.3, "epochs": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def data_cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def _data(cache: str) -> Toy:
    data = Toy(cache_dir=cache, max_val_blocks=8)
    data.prepare_data()
    data.setup("fit")
    return data


def _module(dense: Path, output: Path, **kwargs) -> BlockSparsity:
    schedule = kwargs.pop("schedule", None) or LinearSchedule(**SCHEDULE)
    return BlockSparsity(str(dense), str(output), schedule=schedule, **{**SIZES, **kwargs})


def _fit(module, cache, folder, patience=None, steps=3, ckpt=None, callbacks=(), data=None, **limits):
    warnings.simplefilter("ignore")
    schedule = TierSchedule(patience)
    checkpoint = ModelCheckpoint(folder / "ckpt", save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        **{"max_epochs": -1, **limits},
        limit_train_batches=steps,
        num_sanity_val_steps=0,
        callbacks=[schedule, checkpoint, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data or Toy(cache_dir=cache, max_val_blocks=8), ckpt_path=ckpt)
    return schedule.summary()["tiers"]


@pytest.fixture(scope="module")
def fitted(dense, data_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    _data(data_cache)
    module = _module(dense, folder / "out")
    return module, _fit(module, data_cache, folder), folder


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
    again = _fit(_module(dense, tmp_path / "out"), data_cache, tmp_path, ckpt=str(last))
    assert again["matrices"] == block["matrices"] and again["iterations"] == block["iterations"]


def test_a_run_resumed_between_iterations_ends_the_same(fitted, dense, data_cache, tmp_path):
    _, block, folder = fitted
    again = _module(dense, tmp_path / "out")
    resumed = _fit(again, data_cache, tmp_path, ckpt=str(folder / "ckpt/epoch=0.ckpt"))
    assert resumed["matrices"] == block["matrices"] and resumed["iterations"] == block["iterations"]
    assert resumed["quantiles"] == block["quantiles"]


def test_one_iteration_goes_on_from_a_saved_model_and_its_maps(fitted, dense, data_cache, tmp_path):
    first = _fit(_module(dense, tmp_path / "1", iteration=1), data_cache, tmp_path / "a")
    second = _module(tmp_path / "1", tmp_path / "2", iteration=2)
    block = _fit(second, data_cache, tmp_path / "b")
    before = _module(tmp_path / "1", tmp_path / "x")
    before.configure_model()
    assert before.pruner.counts() == first["matrices"] != block["matrices"]
    for name, tiers in second.pruner.tiers.items():
        assert (tiers.map_rc >= before.pruner.tiers[name].map_rc).all()
    assert [e["iteration"] for e in block["iterations"]] == [2]
    with pytest.raises(ValueError, match="un-demote"):
        _fit(_module(tmp_path / "2", tmp_path / "3", iteration=1), data_cache, tmp_path / "c")
    assert (tmp_path / "2/model.safetensors").is_file() and not (tmp_path / "3").exists()


def test_lora_merges_only_where_weights_are_kept(dense, data_cache, tmp_path):
    module = _module(dense, tmp_path / "out", finetune="lora", schedule=LinearSchedule(**{**SCHEDULE, "iterations": 2}))
    block = _fit(module, data_cache, tmp_path)
    assert [entry["violations"] for entry in block["iterations"]] == [0, 0]
    saved, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", dense))
    changed = 0
    for name, keep in module.pruner.keep.items():
        weight = saved.get_submodule(name).weight
        assert (weight[~keep] == 0).all()
        changed += int((weight != before.get_submodule(name).weight)[keep].sum())
    assert changed > 1000
    ids = batches(1)[0]["input_ids"]
    torch.testing.assert_close(saved(input_ids=ids).logits, module.plain_model.eval()(input_ids=ids).logits)


def test_without_the_masks_training_does_bring_zeros_back(fitted, dense, data_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.block_sparsity.module.mask_gradients", lambda *_: None)
    module = _module(dense, tmp_path / "out")
    monkeypatch.setattr(module, "optimizer_step", lambda *a, **k: L.LightningModule.optimizer_step(module, *a, **k))
    with pytest.raises(RuntimeError, match="pruned weights are not zero after epoch 0"):
        _fit(module, data_cache, tmp_path)


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
    _fit(_module(dense, tmp_path / "out", **options), data_cache, tmp_path, steps=3, callbacks=[whole])
    _fit(_module(dense, tmp_path / "one", **options, iteration=1), data_cache, tmp_path / "b", callbacks=[alone])
    assert whole.rates[:6] == alone.rates and max(alone.rates) == 1e-2 and alone.rates[0] == 0
    assert whole.rates[6:] == pytest.approx([rate / 2 for rate in alone.rates])
    assert whole.moments[6] == 0 < whole.moments[7]
    resumed = Rates()
    ckpt = str(tmp_path / "ckpt/epoch=2.ckpt")
    _fit(_module(dense, tmp_path / "again", **options), data_cache, tmp_path / "c", ckpt=ckpt, callbacks=[resumed])
    assert resumed.rates == whole.rates[9:]


def test_a_schedule_that_cannot_start_again_is_refused(dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match="lr_schedule reduce_lr_on_plateau"):
        _fit(_module(dense, tmp_path / "out", lr_schedule="reduce_lr_on_plateau"), data_cache, tmp_path)


def _fit_a_rank(dense, folder, cache):
    """One of two ranks that would each prune something else; its masks and one matrix."""
    warnings.simplefilter("ignore")
    rank = torch.distributed.get_rank()
    module = _module(dense, folder / "out", score=Random(seed=rank), update=Obs(), iteration=1)
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
    _data(data_cache)
    (mine, weight), (other, others) = two_ranks.run(_fit_a_rank, dense, tmp_path, data_cache)
    assert all(torch.equal(mask, other[name]) for name, mask in mine.items())
    assert torch.equal(weight, others) and not all(mask.all() for mask in mine.values())


def test_tier_maps_may_lie_elsewhere_and_say_their_iteration(dense, data_cache, tmp_path):
    data = _data(data_cache)
    _module(dense, tmp_path / "1", iteration=1).prune(data, CPU)
    tuned = tmp_path / "tuned"  # by another program, which leaves no maps
    AutoModelForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(tuned)
    for maps in (tmp_path / "1", tmp_path / "1" / TIERS_FILE):
        module = _module(tuned, tmp_path / "2", iteration=2, tier_maps=str(maps))
        module.prune(data, CPU)
        assert module.pruner.iteration == 2
    before, after = (_module(tmp_path / n, tmp_path / "x") for n in "12")
    before.configure_model(), after.configure_model()
    assert (before.pruner.iteration, after.pruner.iteration) == (1, 2)
    for name, keep in after.pruner.keep.items():
        assert not (keep & ~before.pruner.keep[name]).any()
    with safe_open(tmp_path / "2" / TIERS_FILE, "pt") as file:
        shares = {name: float(file.metadata()[name]) for name in ("dense", "mid_2_4", "topk")}
    assert shares == pytest.approx(vars(after.pruner.ratios()), abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"model\.tier_maps: .*nowhere"):
        _module(tuned, tmp_path / "3", tier_maps=str(tmp_path / "nowhere")).check_arguments("prune", None)
    assert [path.name for path in (tmp_path / "2").glob("*.safetensors")] == ["model.safetensors"]


def test_a_target_of_bytes_is_met_and_its_k_is_known_afterwards(dense, data_cache, tmp_path):
    data, options = _data(data_cache), {"topk": "auto", "target_bits": 9.0, "scope": "global"}
    block = _fit(_module(dense, tmp_path / "out", **options), data_cache, tmp_path)
    zeros = [entry["sparsity"] for entry in block["iterations"]]
    assert zeros == sorted(zeros) and zeros[0] < zeros[-1]
    module = _module(tmp_path / "out", tmp_path / "packed", topk=None)
    sizes = module.export(data, CPU)["tiers"]
    assert sizes["planned"]["packed_bits_per_weight"] == pytest.approx(9.0, abs=0.3)
    assert sizes["planned"]["packed_bits_per_weight"] <= 9.0
    assert _module(tmp_path / "out", tmp_path / "packed", topk=None).verify(data, CPU)["tiers"]["verified"]
    with pytest.raises(ValueError, match=f"set topk to {module.pruner.k}"):
        _module(tmp_path / "out", tmp_path / "x", topk=module.pruner.k + 1).configure_model()


def test_maps_by_their_old_name_are_read(dense, data_cache, tmp_path):
    _module(dense, tmp_path / "1").prune(_data(data_cache), CPU)
    (tmp_path / "1" / TIERS_FILE).rename(tmp_path / "1/tiers.safetensors")
    (tmp_path / "1/pare.json").unlink()
    module = _module(tmp_path / "1", tmp_path / "x")
    module.configure_model()
    assert module.pruner.sparsity()["sparsity"] > 0.4


def test_weights_that_stay_are_updated_and_finished_layers_are_gone_in_the_end(dense, data_cache, tmp_path):
    data, ppl = _data(data_cache), {}
    for name, update in {"plain": None, "updated": Obs()}.items():
        module = _module(dense, tmp_path / name, update=update, score=Magnitude())
        ppl[name] = module.prune(data, CPU)["val_ppl"]
        assert module.check_masks("afterwards") == 0
        assert not layer_folder(tmp_path / name).exists()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ppl]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_patience_ends_iterations_early_and_the_learning_rate_follows(dense, data_cache, tmp_path):
    schedule = LinearSchedule(**{**SCHEDULE, "iterations": 2, "epochs": 5})
    options = {"schedule": schedule, "learning_rate": 1e-9, "iteration_lr_factor": 0.5, "lr_schedule": "constant"}
    module = _module(dense, tmp_path / "out", **options)
    block = _fit(module, data_cache, tmp_path, patience=1, steps=1)
    assert [entry["iteration"] for entry in block["iterations"]] == [1, 2]
    assert module.trainer.current_epoch < 8
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-10)


def test_the_teacher_is_no_part_of_the_module(dense, data_cache, tmp_path):
    module = _module(dense, tmp_path / "out", teacher=str(dense), iteration=1)
    _fit(module, data_cache, tmp_path, steps=1)
    assert not any("teacher" in name for name, _ in module.named_parameters())


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


def test_prune_export_verify_and_unpack(dense, data_cache, tmp_path, capsys):
    data = _data(data_cache)
    pruned, packed, plain = tmp_path / "pruned", tmp_path / "packed", tmp_path / "plain"
    assert _module(dense, pruned, reconstruction_steps=2).prune(data, CPU, dry_run=True) is None
    assert "packed_ratio" in capsys.readouterr().out and not pruned.exists()
    fields = _module(dense, pruned, reconstruction_steps=2, scope="band").prune(data, CPU)
    assert fields["tiers"]["iterations"][0]["violations"] == 0 and fields["val_ppl"] > 1
    sizes = _module(pruned, packed).export(data, CPU)["tiers"]
    assert sizes["packed_bits_per_weight"] == pytest.approx(sizes["planned"]["packed_bits_per_weight"], rel=0.1)
    report = _module(pruned, packed).verify(data, CPU)["tiers"]["verified"]
    assert report["weights_equal"] and report["violations"] == 0
    _module(pruned, tmp_path / "bands", export_bands=True).export(data, CPU)
    assert _module(pruned, tmp_path / "bands").verify(data, CPU)["tiers"]["verified"]["weights_equal"]
    _module(packed, plain).export(data, CPU)
    ids, unpacked = batches(1)[0]["input_ids"], AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(unpacked(input_ids=ids).logits, load_packed(packed)(input_ids=ids).logits)
    again = _module(plain, tmp_path / "x")
    again.configure_model()
    assert again.pruner.counts() == fields["tiers"]["matrices"]
    for block in (fields["tiers"], sizes):
        assert set(block) <= set(TIERS) and "object" in {TIERS[name].type for name in block}
    for dtype in ("float16", "int8"):
        _module(pruned, packed, export_dtype=dtype).export(data, CPU)
        assert _module(pruned, packed).verify(data, CPU)["tiers"]["verified"]["weights_equal"]
        for name in ("model.layers.1.mlp.up_proj", "lm_head"):
            other = _module(pruned, packed)
            other.configure_model()
            with torch.no_grad():
                other.plain_model.get_submodule(name).weight[0].mul_(1.05)
            with pytest.raises(ValueError, match="differ"):
                other.verify(data, CPU)


def test_weights_and_masks_are_compared_before_weights_leave_for_the_device(dense, data_cache, tmp_path, monkeypatch):
    """Masks stay where they are: on a GPU they could not be compared with weights any more."""
    data, done = _data(data_cache), []
    _module(dense, tmp_path / "pruned").prune(data, CPU)
    _module(tmp_path / "pruned", tmp_path / "packed").export(data, CPU)

    def note(name):
        call = getattr(verification, name)
        monkeypatch.setattr(verification, name, lambda *args: done.append(name) or call(*args))

    note("read_packed")
    note("violations")
    note("logits")
    _module(tmp_path / "pruned", tmp_path / "packed").verify(data, CPU)
    assert done == ["read_packed", "violations", *["logits"] * 3]  # a file of gigabytes, read once


def test_equal_sparsity_without_structure_is_a_baseline(dense, data_cache, tmp_path):
    fields = _module(dense, tmp_path / "out", pattern="unstructured").prune(_data(data_cache), CPU)
    assert fields["tiers"]["sparsity"] == pytest.approx(0.2 + 0.3 * (1 - 6 / 64), abs=0.02)
    assert fields["tiers"]["matrices"] == [] and fields["tiers"]["iterations"][0]["dense"] is None
    with pytest.raises(ValueError, match="pattern"):
        _module(tmp_path / "out", tmp_path / "y").configure_model()


def test_maps_of_another_model_or_block_size_are_refused(fitted, dense, data_cache, tmp_path):
    _, _, folder = fitted
    with pytest.raises(ValueError, match="set block to 8"):
        _module(folder / "out", tmp_path / "x", block=16).configure_model()
    with pytest.raises(ValueError, match="set topk to 6"):
        _module(folder / "out", tmp_path / "x", topk=5).configure_model()
    state = fitted[0].pruner.state()
    state["tensors"] = {name.replace("layers.1", "layers.7"): t for name, t in state["tensors"].items()}
    with pytest.raises(ValueError, match="another model"):
        fitted[0].pruner.load_state(state, "the file")
    with pytest.raises(FileNotFoundError, match="tier maps"):
        _module(dense, tmp_path / "x").export(_data(data_cache), CPU)


def test_the_ratio_of_a_packed_model_means_one_thing_planned_and_measured(dense, data_cache, tmp_path, capsys):
    data, pruned, packed = _data(data_cache), tmp_path / "pruned", tmp_path / "packed"
    _module(dense, pruned).prune(data, CPU)
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    for dtype in ("float16", "float32", "int8"):
        sizes = _module(pruned, packed, export_dtype=dtype).export(data, CPU)["tiers"]
        file, tensors = packed / "packed.safetensors", load_file(packed / "packed.safetensors")
        whole = 2 * tiny_llama().num_parameters()
        assert sizes["packed_bytes"] == file.stat().st_size
        assert sizes["packed_ratio"] == pytest.approx(whole / file.stat().st_size)
        expected = whole / sum(t.nbytes for t in tensors.values())  # without the header, which is not planned
        assert sizes["planned"]["packed_ratio"] == pytest.approx(expected, rel=0.08)
        if dtype == "float16":
            assert float(printed["packed_ratio"]) == pytest.approx(sizes["planned"]["packed_ratio"], rel=0.08)


def test_a_16_bit_model_is_pruned_packed_and_unpacked_in_its_own_type(data_cache, tmp_path):
    data = _data(data_cache)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    paths = [tmp_path / name for name in ("dense", "pruned", "packed", "plain")]
    _module(paths[0], paths[1], score=Magnitude()).prune(data, CPU)
    _module(paths[1], paths[2]).export(data, CPU)
    _module(paths[2], paths[3]).export(data, CPU)
    dense, pruned, plain = (AutoModelForCausalLM.from_pretrained(paths[i], dtype="auto") for i in (0, 1, 3))
    assert dense.dtype == pruned.dtype == plain.dtype == load_packed(paths[2]).dtype == torch.bfloat16
    assert (paths[2] / "generation_config.json").is_file()
    for name, weight in dense.named_parameters():
        kept = pruned.get_parameter(name) != 0
        assert torch.equal(pruned.get_parameter(name)[kept], weight[kept])  # nothing was rounded twice
        assert torch.equal(plain.get_parameter(name), pruned.get_parameter(name))
    assert load_file(paths[2] / "packed.safetensors")["model.layers.0.mlp.up_proj.dense"].dtype == torch.bfloat16


def test_a_pruned_model_is_there_before_its_perplexity_is_measured(dense, data_cache, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_module, "validation_perplexity", stopped)
    with pytest.raises(KeyboardInterrupt):
        _module(dense, tmp_path / "out").prune(_data(data_cache), CPU)
    again = _module(tmp_path / "out", tmp_path / "x")
    again.configure_model()
    assert again.pruner.sparsity()["sparsity"] > 0.4


def test_a_home_folder_is_the_same_folder(dense, data_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = _data(data_cache)
    _module(dense, "~/pruned").prune(data, CPU)
    _module("~/pruned", "~/packed").export(data, CPU)
    assert _module("~/pruned", "~/packed").verify(data, CPU)["tiers"]["verified"]["weights_equal"]
    assert (tmp_path / "packed/packed.safetensors").is_file()


def _thesis(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.mark.parametrize("command", ["prune", "export", "fit"])
@pytest.mark.parametrize("where", ["foreign", "is an input", "inside an input", "contains an input", "teacher"])
def test_a_folder_that_is_not_pares_or_is_read_is_refused_before_anything_is_loaded(
    where, command, dense, data_cache, tmp_path, monkeypatch
):
    base = save_tiny(tmp_path / "base/model")
    teacher = save_tiny(tmp_path / "teacher")
    outputs = {"foreign": _thesis(tmp_path / "mine"), "is an input": base, "inside an input": base / "out"}
    output = {**outputs, "contains an input": base.parent, "teacher": teacher}[where]
    monkeypatch.setattr(block_module, "load", lambda *_, **__: pytest.fail("something was loaded"))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    module, data = _module(base, output, teacher=str(teacher), overwrite=where != "foreign"), _data(data_cache)
    with pytest.raises(ValueError, match=r"model\.output: "):
        _fit(module, data_cache, tmp_path / "fit") if command == "fit" else getattr(module, command)(data, CPU)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_overwrite_replaces_a_folder_only_when_the_new_one_is_complete(dense, data_cache, tmp_path, monkeypatch):
    folder, data = _thesis(tmp_path / "mine"), _data(data_cache)
    monkeypatch.setattr(Pruner, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _module(dense, folder, overwrite=True).prune(data, CPU)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    monkeypatch.undo()
    _module(dense, folder, overwrite=True).prune(data, CPU)
    assert (folder / TIERS_FILE).is_file() and not (folder / "thesis.txt").exists()


@pytest.mark.parametrize("name", [TIERS_FILE, "model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_pruned_folder_is_named(name, dense, data_cache, tmp_path):
    _module(dense, tmp_path / "out").prune(_data(data_cache), CPU)
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)
    with pytest.raises((DamagedError, ValueError), match=name):
        _module(tmp_path / "out", tmp_path / "x").configure_model()


@pytest.fixture(scope="module")
def saved_maps(tmp_path_factory):
    folders = {}
    for pattern in ("tiers", "unstructured"):
        folders[pattern] = tmp_path_factory.mktemp(pattern)
        model = tiny_llama()
        pruner = Pruner(model, block=8, k=6, pattern=pattern)
        prune(model, pruner, LinearSchedule(**SCHEDULE).rows[-1].ratios, Magnitude())
        pruner.save(folders[pattern])
    return folders


@given(st.sampled_from(["tiers", "unstructured"]), st.integers(0), st.integers(1, 255), st.booleans())
def test_damaged_tier_maps_without_a_manifest_are_named_or_still_maps(saved_maps, pattern, place, flip, cut):
    whole = (saved_maps[pattern] / TIERS_FILE).read_bytes()
    content = bytearray(whole)
    content[place % len(whole)] ^= flip
    folder = saved_maps[pattern] / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / TIERS_FILE).write_bytes(content[: place % len(whole)] if cut else content)
    pruner = Pruner(tiny_llama(), block=8, k=6, pattern=pattern)
    try:
        pruner.load(folder)
    except ValueError as error:
        assert str(folder / TIERS_FILE) in str(error)
        return
    assert all(keep.shape == pruner.matrices[name].weight.shape for name, keep in pruner.keep.items())
    for tiers in pruner.tiers.values():
        tiers.check()


def test_calibration_is_spread_evenly_over_the_training_text(data_cache):
    data = _data(data_cache)
    rows = data.train["input_ids"]
    for count in (1, 5, len(rows)):
        batches = data.calibration(count)
        found = torch.cat([batch["input_ids"] for batch in batches])
        assert torch.equal(found, rows[[i * len(rows) // count for i in range(count)]])
        assert all(len(batch["input_ids"]) <= data.batch_size and "labels" in batch for batch in batches)
    assert len(rows) > 40 and not torch.equal(torch.cat([b["input_ids"] for b in data.calibration(5)]), rows[:5])


def test_what_prunes_has_seen_the_calibration_text(dense, data_cache, tmp_path, monkeypatch):
    data, seen = _data(data_cache), []
    original = block_module.prune_layers
    monkeypatch.setattr(block_module, "prune_layers", lambda *a: seen.extend(a[4]) or original(*a))
    _module(dense, tmp_path / "out").prune(data, CPU)
    wanted = torch.cat([batch["input_ids"] for batch in data.calibration(SIZES["calibration_blocks"])])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in seen]), wanted)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_teacher_has_its_share_of_the_loss_and_the_text_the_rest(share, dense, tmp_path, monkeypatch):
    module = _module(dense, tmp_path / "out", distill_weight=share)
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
    tokenizer = _data(data_cache).tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [{"instruction": f"Say {i}.", "input": "", "output": "the one red " * (1 + i % 4)} for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sizes = {"max_length": 64, "batch_size": 4, "packing": packing, "cache_dir": str(tmp_path / "cache")}
    data = InstructData(str(tmp_path / "chats.jsonl"), str(tmp_path / "tokenizer"), **sizes, padding_side="left")
    options = {"score": score, "reconstruction_steps": 1, "teacher": str(dense), "iteration": 1}
    tiers = _fit(_module(dense, tmp_path / "out", **options), data_cache, tmp_path / "fit", steps=1, data=data)
    assert tiers["iterations"][0]["violations"] == 0 and tiers["sparsity"] > 0.1


def test_data_without_calibration_text_are_refused_before_the_first_step(dense, tmp_path):
    class Other(L.LightningDataModule):
        def train_dataloader(self):
            return batches(2)

    with pytest.raises(ValueError, match="calibration text, such as TextCorpus, not Other"):
        _fit(_module(dense, tmp_path / "out"), "", tmp_path, data=Other())


def test_a_run_that_is_stopped_early_says_how_far_the_saved_model_is_pruned(dense, data_cache, tmp_path, monkeypatch):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    said = []
    monkeypatch.setattr("callbacks.tier_schedule.rank_zero_warn", said.append)
    _fit(_module(dense, tmp_path / "out"), data_cache, tmp_path, callbacks=[Stop()])
    assert said == ["stopped after iteration 1 of 3: what is saved is that far pruned"]
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"max_epochs": 7}, "max_epochs is 7, but the schedule has 3 epochs"),
        ({"max_steps": 6}, "max_steps 6 ends before iteration 3 begins, after step 6"),
    ],
)
def test_limits_that_contradict_the_schedule_are_refused(limits, names, dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match=names):
        _fit(_module(dense, tmp_path / "out"), data_cache, tmp_path, **limits)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"block": 64, "topk": 10}, "smaller than a block"),
        ({"calibration_blocks": 10_000}, "calibration_blocks"),
    ],
)
def test_what_is_wrong_is_named(arguments, names, dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match=names):
        _module(dense, tmp_path / "x", **arguments).prune(_data(data_cache), CPU)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"iteration": 4}, "1 to 3"),
        ({"iteration": 0}, "1 to 3"),
        ({"topk": 25}, "between 1 and 24 of the 64 weights"),
        ({"topk": "auto"}, "topk auto needs target_bits"),
        ({"target_bits": 1.0}, "target_bits must be between"),
        ({"target_bits": 17.0}, "target_bits must be between"),
        ({"target_bits": 9.0, "pattern": "2:4"}, "pattern 2:4 has none"),
        ({"block": 6}, "multiple of 4"),
        ({"distill_weight": 2}, "distill_weight"),
        ({"row_relative": True, "matrix_relative": True}, "cannot both be true"),
        ({"calibration_blocks": 0}, "calibration_blocks must be at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"reconstruction_steps": -1}, "reconstruction_steps must be at least 0"),
        ({"reconstruction_lr": 0.0}, "reconstruction_lr must be above 0"),
        ({"iteration_lr_factor": float("nan")}, "iteration_lr_factor must be above 0"),
        ({"budget": "band"}, r"now called model\.scope"),
    ],
)
def test_arguments_are_refused_before_anything_is_read(arguments, names, tmp_path):
    with pytest.raises(ValueError, match=names):
        _module(tmp_path / "no model here", tmp_path / "x", **arguments)


def test_nothing_to_export_or_verify_is_said_before_anything_is_loaded(fitted, dense, tmp_path):
    pruned = fitted[2] / "out"
    with pytest.raises(FileNotFoundError, match="tier maps"):
        _module(dense, tmp_path / "x").check_arguments("export", None)
    with pytest.raises(FileNotFoundError, match="no packed model"):
        _module(pruned, tmp_path / "x").check_arguments("verify", None)
    _module(pruned, tmp_path / "x").check_arguments("validate", None)
    with pytest.raises(FileNotFoundError, match="no teacher here"):
        _module(dense, tmp_path / "x", teacher=str(tmp_path / "no teacher here")).check_arguments("fit", None)
    with pytest.raises(FileNotFoundError, match="no model here"):
        _module(tmp_path / "no model here", tmp_path / "x").check_arguments("prune", None)
