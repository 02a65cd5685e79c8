"""Masks through real training, and the commands around it, on a tiny Llama and made-up text."""

import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from callbacks import TierSchedule
from lightning_modules.block_sparsity import BlockSparsity, load_packed
from lightning_modules.block_sparsity.masks import mask_weights, violations
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.block_sparsity.reconstruction import reconstruct
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from tests.lightning_modules.block_sparsity.toy import batches, save_tiny, tiny_llama
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


def _fit(module, cache, folder, patience=None, steps=3, ckpt=None, callbacks=()):
    warnings.simplefilter("ignore")
    schedule = TierSchedule(patience)
    checkpoint = ModelCheckpoint(folder / "ckpt", save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        limit_train_batches=steps,
        num_sanity_val_steps=0,
        callbacks=[schedule, checkpoint, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=Toy(cache_dir=cache, max_val_blocks=8), ckpt_path=ckpt)
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
    assert zeros == sorted(zeros) and zeros[-1] == pytest.approx(0.2 + 0.3 * (1 - 6 / 64), abs=0.02)
    assert all(entry["ppl"] > 1 for entry in block["iterations"])
    for matrix in block["matrices"]:
        assert len(matrix["map"]) == matrix["rows"] * matrix["columns"] and set(matrix["map"]) <= set("012")
    assert {len(q) for q in block["quantiles"].values()} == {5}
    saved = AutoModelForCausalLM.from_pretrained(folder / "out")
    before = AutoModelForCausalLM.from_pretrained(dense)
    for name, keep in module.pruner.keep.items():
        weight = saved.get_submodule(name).weight
        assert (weight[~keep] == 0).all() and (weight[keep] != before.get_submodule(name).weight[keep]).any()


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
    old = {m["name"]: m["map"] for m in first["matrices"]}
    for matrix in block["matrices"]:
        assert all(new >= before for new, before in zip(matrix["map"], old[matrix["name"]], strict=True))
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


def test_reconstruction_brings_outputs_closer_and_holds_masks():
    model, text = tiny_llama(), batches(4, 4)
    pruner = Pruner(model, block=8, k=6)
    from lightning_modules.block_sparsity.scores.wanda import Wanda

    pruner.prune(model, LinearSchedule(**SCHEDULE).rows[-1].ratios, Wanda(), text, CPU)
    norm = model.model.norm.weight.clone()
    errors = reconstruct(model, pruner.matrices, pruner.keep, text, CPU, steps=20, learning_rate=3e-3)
    assert len(errors) == 2 and all(after < 0.9 * before for before, after in errors)
    assert violations(pruner.matrices, pruner.keep) == 0
    assert torch.equal(model.model.norm.weight, norm) and all(p.grad is None for p in model.parameters())


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
    assert again.pruner.maps() == fields["tiers"]["matrices"]
    with pytest.raises(ValueError, match="differ"):
        other = _module(pruned, packed)
        other.configure_model()
        with torch.no_grad():
            other.pruner.matrices["model.layers.1.mlp.up_proj"].weight[0].mul_(1.5)
        other.verify(data, CPU)


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


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"topk": 40}, "half a block"),
        ({"block": 6}, "multiple of 4"),
        ({"block": 64, "topk": 10}, "smaller than a block"),
        ({"calibration_blocks": 10_000}, "calibration_blocks"),
    ],
)
def test_what_is_wrong_is_named(arguments, names, dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match=names):
        _module(dense, tmp_path / "x", **arguments).prune(_data(data_cache), CPU)


def test_an_iteration_out_of_the_schedule_or_a_silly_weight_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match="1 to 3"):
        _module(dense, tmp_path / "x", iteration=4)
    with pytest.raises(ValueError, match="distill_weight"):
        _module(dense, tmp_path / "x", distill_weight=2)
