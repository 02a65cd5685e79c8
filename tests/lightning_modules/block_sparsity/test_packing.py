"""Packed bytes: exact, as small as claimed, and refused when damaged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_modules.block_sparsity import load_packed
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.masks import mask_weights
from lightning_modules.block_sparsity.packed_model import PACKED_FILE, PackedLinear, write_packed
from lightning_modules.block_sparsity.packing import Layout, pack, unpack, unpack_keep
from lightning_modules.block_sparsity.pruner import Pruner, packed_bits
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.tiers import TierMap
from tests.lightning_modules.block_sparsity.toy import batches, scored, tiny_llama

CPU = torch.device("cpu")
FORMULA = {(0.9, 0.1, 0.0), (0.35, 0.45, 0.2), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)}


def _pruned(shape, ratios, block=16, k=10, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tiers = TierMap("m", shape, block, k, CPU)
    demote({"m": scored(weight.abs())}, {"m": tiers}, Ratios(*ratios))
    return weight.masked_fill(~tiers.keep_RC, 0.0), tiers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "block", "k"), [((64, 96), 16, 10), ((44, 37), 8, 6), ((70, 66), 32, 20)])
def test_round_trip_is_exact_with_masks(shape, block, k, dtype):
    weight, tiers = _pruned(shape, (0.4, 0.3, 0.3), block, k)
    alive = tiers.keep_RC.nonzero()[::7]
    weight[alive[:, 0], alive[:, 1]] = 0.0  # a kept weight may be zero and is still kept
    parts, layout = pack(weight, tiers, dtype), Layout(*shape, block, k)
    assert torch.equal(unpack(parts, layout, dtype), weight.to(dtype))
    tier_map, keep = unpack_keep(parts, layout)
    assert torch.equal(tier_map, tiers.map_rc) and torch.equal(keep, tiers.keep_RC)


@pytest.mark.parametrize("ratios", sorted(FORMULA))
def test_bytes_are_the_formula(ratios):
    weight, tiers = _pruned((512, 512), ratios)
    bits = 8 * sum(t.nbytes for t in pack(weight, tiers, torch.float16).values()) / weight.numel()
    dense, mid, topk = (count / 1024 for count in tiers.counts())
    assert bits == pytest.approx(16 * dense + 9 * mid + 0.9375 * topk + 0.0078125)
    assert bits == pytest.approx(packed_bits(Ratios(dense, mid, topk), 16, 10))


def test_int8_values_are_half_the_bytes_and_within_half_a_step():
    weight, tiers = _pruned((256, 256), (0.25, 0.65, 0.1))
    parts, layout = pack(weight, tiers, torch.int8), Layout(256, 256, 16, 10)
    found = unpack(parts, layout, torch.float32)
    assert (found[~tiers.keep_RC] == 0).all()
    assert (found - weight).abs().max() <= weight.abs().max() / 127 / 2 * 1.01
    wide = sum(t.nbytes for t in pack(weight, tiers, torch.float16).values())
    assert sum(t.nbytes for t in parts.values()) < 0.66 * wide
    assert torch.equal(unpack_keep(parts, layout)[1], tiers.keep_RC)


def test_a_weight_that_is_not_masked_or_does_not_fit_is_refused():
    weight, tiers = _pruned((32, 32), (0.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="not zero"):
        pack(torch.ones(32, 32), tiers, torch.float16)
    with pytest.raises(ValueError, match="bfloat16"):
        pack(weight * 1e6, tiers, torch.float16)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_llama(tied=request.param)
    pruner = Pruner(model, block=8, k=6)
    pruner.prune(model, Ratios(0.35, 0.45, 0.2), Magnitude(), [], CPU)
    mask_weights(pruner.matrices, pruner.keep)
    sizes = write_packed(folder, model, model.state_dict(), pruner.tiers, "float32")
    return folder, model, sizes


def test_one_call_loads_a_packed_model_with_the_same_logits(packed):
    folder, model, sizes = packed
    ids = batches(1)[0]
    for expand in (True, False):
        again = load_packed(folder, expand=expand)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert sizes["packed_bytes"] == (folder / PACKED_FILE).stat().st_size
    layers = [m for m in again.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 14
    held = sum(b.nbytes for layer in layers for b in layer.buffers())
    assert held < 0.8 * sum(4 * p.numel() for n, p in model.named_parameters() if "proj" in n)
    half = again.to(torch.bfloat16)
    assert half(input_ids=ids).logits.dtype == torch.bfloat16  # indices keep their type


def test_packed_layers_generate(packed):
    folder, model, _ = packed
    ids, options = batches(1)[0][:1], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load_packed(folder, expand=False).generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "other"])
def test_damaged_files_are_refused(packed, damage, tmp_path):
    folder, _, _ = packed
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    path, whole = tmp_path / PACKED_FILE, (folder / PACKED_FILE).read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "bit":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    else:
        with safe_open(folder / PACKED_FILE, "pt") as file:
            about = dict(file.metadata())
        if damage == "header":
            layouts = json.loads(about["matrices"])
            layouts["model.layers.0.mlp.up_proj"]["rows"] += 1
            about["matrices"] = json.dumps(layouts)
        else:
            about = {"format": "pt"}
        save_file(load_file(folder / PACKED_FILE), path, about)
    names = {"cut": "cut short", "bit": "altered", "header": "altered", "other": "expected a file of kind"}
    with pytest.raises(ValueError, match=names[damage]):
        load_packed(tmp_path)


def test_a_folder_without_a_packed_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="packed"):
        load_packed(tmp_path)
