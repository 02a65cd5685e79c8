"""Pruning and fine-tuning where every rank has only parts of the matrices, on two gloo ranks."""

import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load, load_file

from lightning_modules.block_sparsity import sharded
from lightning_modules.block_sparsity.pruner import TIERS_FILE
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from lightning_modules.block_sparsity.updates.obs import Obs
from strategies import CompressedFSDP, CompressedFSDP2
from tests.lightning_modules.block_sparsity.runs import SCHEDULE, data_of, fit, module_of
from tests.lightning_modules.block_sparsity.toy import tiny_llama
from tests.lightning_modules.data.toy import Toy

ENGINES = {"fsdp1": CompressedFSDP, "fsdp2": CompressedFSDP2}


class Pieces(L.Callback):
    """How many weights and masks this rank holds after the last step."""

    def on_train_end(self, trainer, module):
        self.weights = sum(sharded.local(m.weight).numel() for m in module.pruner.matrices.values())
        self.masks = sum(mask.numel() for mask in module.held.values())
        self.same_shape = all(
            mask.shape == sharded.local(module.pruner.matrices[name].weight).shape for name, mask in module.held.items()
        )


class SameText(Toy):
    """All ranks see the same, so the mean of their gradients is that of one device to the bit."""

    def _ranks(self):
        return {"num_replicas": 1, "rank": 0}


def _run(dense, folder, cache, engine=None, ckpt=None, **options):
    module = module_of(dense, folder / "out", schedule=LinearSchedule(**{**SCHEDULE, "iterations": 2}), **options)
    pieces = Pieces()
    limits = {"devices": 2, "strategy": ENGINES[engine]()} if engine else {}
    data = SameText(cache_dir=cache, max_val_blocks=8)
    block = fit(module, cache, folder, steps=2, ckpt=ckpt, callbacks=[pieces], data=data, **limits)
    whole = sum(mask.numel() for mask in module.pruner.keep.values())
    return block, (pieces.weights, pieces.masks, whole, pieces.same_shape)


@pytest.fixture(scope="module")
def alone(dense, data_cache, tmp_path_factory):
    data_of(data_cache)
    folder = tmp_path_factory.mktemp("alone")
    block, _ = _run(dense, folder, data_cache, update=Obs())
    return block, folder


def _results(folder):
    return load_file(folder / "out/model.safetensors"), load((folder / "out" / TIERS_FILE).read_bytes())


def _equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_are_cut_like_their_weights_and_all_is_as_on_one_device(
    engine, alone, dense, data_cache, tmp_path, two_ranks
):
    ran = two_ranks.run(partial(_run, update=Obs()), dense, tmp_path / "a", data_cache, engine)
    block, folder = alone
    for found, (weights, masks, whole, same_shape) in ran:
        assert same_shape and weights == masks < whole
        assert found["matrices"] == block["matrices"]
        assert [entry["violations"] for entry in found["iterations"]] == [0, 0]
    assert sum(sizes[0] for _, sizes in ran) == ran[0][1][2]
    ckpt = str(tmp_path / "a/ckpt/epoch=0.ckpt")
    two_ranks.run(partial(_run, update=Obs()), dense, tmp_path / "b", data_cache, engine, ckpt)
    for place in (tmp_path / "a", tmp_path / "b"):
        assert all(_equal(found, expected) for found, expected in zip(_results(place), _results(folder), strict=True))


class Masks(L.Callback):
    """Zeros of what this rank holds, by epoch."""

    def __init__(self):
        self.zeros = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.zeros[trainer.current_epoch] = sum(int((~mask).sum()) for mask in module.held.values())


def _long(dense, folder, cache, engine, ckpt=None):
    module = module_of(dense, folder / "out", schedule=LinearSchedule(**{**SCHEDULE, "iterations": 1, "epochs": 2}))
    masks, data = Masks(), SameText(cache_dir=cache, max_val_blocks=8)
    fit(module, cache, folder, steps=2, ckpt=ckpt, callbacks=[masks], data=data, devices=2, strategy=ENGINES[engine]())
    return masks.zeros


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_stopped_between_demotions_goes_on_under_its_masks(engine, dense, data_cache, tmp_path, two_ranks):
    whole = two_ranks.run(_long, dense, tmp_path / "a", data_cache, engine)
    resumed = two_ranks.run(_long, dense, tmp_path / "b", data_cache, engine, str(tmp_path / "a/ckpt/epoch=0.ckpt"))
    assert resumed == [{1: zeros[1]} for zeros in whole] and all(zeros[1] > 0 for zeros in whole)
    assert all(_equal(*pair) for pair in zip(_results(tmp_path / "a"), _results(tmp_path / "b"), strict=True))


def test_adapters_need_whole_weights(dense, data_cache, tmp_path):
    warnings.simplefilter("ignore")
    module = module_of(dense, tmp_path / "out", finetune="lora")
    module._trainer = L.Trainer(accelerator="cpu", strategy=CompressedFSDP(), logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="only finetune full runs under FSDP"):
        module.setup("fit")


def test_whole_weights_have_whole_masks():
    model = tiny_llama()
    assert not sharded.is_sharded(model)
    matrices = {"m": model.model.layers[0].self_attn.q_proj}
    keep = {"m": torch.ones_like(matrices["m"].weight, dtype=torch.bool)}
    assert torch.equal(sharded.cut_masks(model, matrices, keep)["m"], keep["m"])
