"""Packed bytes: exact, as small as claimed, and refused when damaged."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.files import replacing
from common.manifest import DamagedError
from lightning_modules.block_sparsity import load_packed
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.masks import mask_weights
from lightning_modules.block_sparsity.packed_model import (
    PACKED_FILE,
    PackedLinear,
    read_packed,
    write_model,
    write_packed,
)
from lightning_modules.block_sparsity.packing import DTYPES, Layout, pack, unpack, unpack_keep
from lightning_modules.block_sparsity.pruner import Pruner, packed_bits
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.tiers import TOPK, TierMap, to_blocks
from tests.lightning_modules.block_sparsity.toy import batches, prune, scored, tiny_llama

CPU = torch.device("cpu")
BYTE, CUT = st.integers(1, 255), st.booleans()
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
    bits = {
        name: 8 * sum(t.nbytes for t in pack(weight, tiers, DTYPES[name]).values()) / weight.numel()
        for name in ("float16", "float32", "int8")
    }
    dense, mid, topk = (count / 1024 for count in tiers.counts())
    assert bits["float16"] == pytest.approx(16 * dense + 9 * mid + 0.9375 * topk + 0.0078125)
    for name, found in bits.items():
        assert found == pytest.approx(packed_bits(Ratios(dense, mid, topk), 16, 10, name))


def test_int8_values_are_half_the_bytes_and_within_half_a_step():
    weight, tiers = _pruned((256, 256), (0.25, 0.65, 0.1))
    parts, layout = pack(weight, tiers, torch.int8), Layout(256, 256, 16, 10)
    found = unpack(parts, layout, torch.float32)
    assert (found[~tiers.keep_RC] == 0).all()
    assert (found - weight).abs().max() <= weight.abs().max() / 127 / 2 * 1.01
    wide = sum(t.nbytes for t in pack(weight, tiers, torch.float16).values())
    assert sum(t.nbytes for t in parts.values()) < 0.66 * wide
    assert torch.equal(unpack_keep(parts, layout)[1], tiers.keep_RC)


def test_int8_has_a_scale_for_every_row_of_a_block_and_for_every_topk_block():
    weight, tiers = _pruned((64, 96), (0.4, 0.3, 0.3))
    weight *= 2.0 ** torch.arange(64).remainder(16)[:, None].sub(8)  # neighbouring rows differ by a factor of two
    found = unpack(pack(weight, tiers, torch.int8), Layout(64, 96, 16, 10), torch.float32)
    blocks, wrong = to_blocks(weight, 16).abs(), (to_blocks(found, 16) - to_blocks(weight, 16)).abs()
    rows, whole = blocks.amax(-1, keepdim=True), blocks.amax((-1, -2), keepdim=True)
    step = torch.where((tiers.map_rc == TOPK)[..., None, None], whole, rows) / 127
    assert (wrong <= 0.51 * step + 2.0**-24).all()


def test_a_weight_that_is_not_masked_or_does_not_fit_is_refused():
    weight, tiers = _pruned((32, 32), (0.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="not zero"):
        pack(torch.ones(32, 32), tiers, torch.float16)
    for dtype, size in ((torch.float16, 1e6), (torch.int8, 1e8)):
        with pytest.raises(ValueError, match="bfloat16"):
            pack(weight * size, tiers, dtype)


def test_what_is_not_pruned_must_fit_its_type_too(tmp_path):
    model, pruner = _pruned_model(True)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    with pytest.raises(ValueError, match=r"^model\.norm\.weight: a weight does not fit torch\.float16"):
        write_packed(tmp_path, model, model.state_dict(), pruner.tiers, "float16")
    with pytest.raises(ValueError, match=r"^model\.norm\.weight: a weight does not fit torch\.float16"):
        write_model(tmp_path, model, torch.float16)
    assert not list(tmp_path.iterdir())


def _pruned_model(tied):
    model = tiny_llama(tied=tied)
    pruner = Pruner(model, block=8, k=6, scope="band")
    prune(model, pruner, Ratios(0.35, 0.45, 0.2), Magnitude())
    mask_weights(pruner.matrices, pruner.keep)
    return model, pruner


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def packed(request, tmp_path_factory):
    model, pruner = _pruned_model(request.param)
    with replacing(tmp_path_factory.mktemp("packed") / "model", "packed model") as folder:
        sizes = write_packed(folder, model, model.state_dict(), pruner.tiers, "float32")
    return folder.with_name("model"), model, sizes


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same model in the forms that there are, without manifests."""
    folder = tmp_path_factory.mktemp("forms")
    model, pruner = _pruned_model(True)
    for name, dtype, bands in (("plain", "float16", False), ("bands", "int8", True), ("int8", "int8", False)):
        (folder / name).mkdir()
        write_packed(folder / name, model, model.state_dict(), pruner.tiers, dtype, bands)
    return folder


def test_one_call_loads_a_packed_model_with_the_same_logits(packed):
    folder, model, sizes = packed
    ids = batches(1)[0]["input_ids"]
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


def test_packed_layers_move_whole_where_the_type_is_another(packed):
    again = load_packed(packed[0], expand=False)
    layer = next(m for m in again.modules() if isinstance(m, PackedLinear))
    types = {name: part.dtype for name, part in layer.parts.items()}
    again.to("meta", torch.float16)
    assert {part.device.type for part in layer.parts.values()} == {"meta"}
    assert {name: part.dtype for name, part in layer.parts.items()} == types


def test_packed_layers_generate(packed):
    folder, model, _ = packed
    ids, options = batches(1)[0]["input_ids"][:1], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load_packed(folder, expand=False).generate(ids, **options), model.generate(ids, **options))


def test_a_model_that_stays_packed_is_saved_as_a_plain_folder(packed, tmp_path):
    folder, model, _ = packed
    for dtype in (torch.float32, torch.bfloat16):
        load_packed(folder, expand=False).to(dtype).save_pretrained(tmp_path)
        again, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert again.dtype == dtype
        assert all(torch.equal(p, model.get_parameter(name).to(dtype)) for name, p in again.named_parameters())


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_a_16_bit_model_and_its_generation_settings_come_back_as_they_were(values, tmp_path):
    model, _ = _pruned_model(tied=False)
    model.to(torch.bfloat16).config.dtype = torch.bfloat16
    model.generation_config.repetition_penalty = 1.3
    pruner = _pruned_model(tied=False)[1]
    write_packed(tmp_path, model, model.state_dict(), pruner.tiers, values)
    for expand in (True, False):
        again = load_packed(tmp_path, expand=expand)
        assert again.dtype == torch.bfloat16 and again.generation_config.repetition_penalty == 1.3
        exact = [name for name, p in again.named_parameters() if torch.equal(p, model.get_parameter(name))]
        assert set(exact) >= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert load_packed(tmp_path, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("field", ["intermediate_size", "vocab_size", "num_hidden_layers", "attention_bias"])
def test_a_configuration_of_another_model_is_refused_by_the_weights_name(packed, field, expand, tmp_path):
    shutil.copytree(packed[0], tmp_path / "other")
    (tmp_path / "other/pare.json").unlink()  # edited on purpose
    config = json.loads((tmp_path / "other/config.json").read_text())
    config[field] = True if field == "attention_bias" else config[field] + 1
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    names = {
        "vocab_size": "(embed_tokens|lm_head)",
        "num_hidden_layers": r"layers\.2",
        "attention_bias": "bias is missing",
    }
    with pytest.raises(ValueError, match=f"does not fit config.json: .*{names.get(field, 'mlp')}"):
        load_packed(tmp_path / "other", expand=expand)


def _damaged(folder, whole, name, place, flip, cut):
    """A copy of a folder in which one file has a flipped byte, or ends early."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    content = bytearray((folder / name).read_bytes())
    content[place % len(content)] ^= flip
    (folder / name).write_bytes(content[: place % len(content)] if cut else content)
    return folder


@given(st.sampled_from(["packed.safetensors", "config.json", "generation_config.json"]), st.integers(0), BYTE, CUT)
def test_any_damaged_file_of_a_packed_folder_is_named(packed, name, place, flip, cut):
    folder = _damaged(packed[0].parent / "damaged", packed[0], name, place, flip, cut)
    with pytest.raises(DamagedError, match=name):
        load_packed(folder)


@given(st.sampled_from(["plain", "bands", "int8"]), st.one_of(st.integers(0, 40_000), st.integers(0)), BYTE, CUT)
def test_a_damaged_file_without_a_manifest_is_named_or_still_a_model_that_fits(forms, form, place, flip, cut):
    folder = _damaged(forms / "damaged", forms / form, PACKED_FILE, place, flip, cut)
    try:
        packed, expanded = (load_packed(folder, expand=expand) for expand in (False, True))
    except ValueError as error:
        assert str(folder) in str(error)
        return
    assert packed.state_dict().keys() == expanded.state_dict().keys()
    list(read_packed(folder).tiers())


@pytest.mark.parametrize(
    ("part", "change", "names"),
    [
        ("map", lambda t: t | 3, "map has values other"),
        ("mid_index", lambda t: torch.zeros_like(t), "mid_index names one place"),
        ("topk_index", lambda t: t + 200, "topk_index has places"),
        ("topk_index", lambda t: torch.zeros_like(t), "has one twice"),
        ("dense", lambda t: t[1:], r"dense is torch.float32 \(\d+, 8, 8\) where"),
        ("topk", lambda t: t.half(), "topk is torch.float16"),
        ("mid", None, "mid is missing"),
        ("rows", None, "unexpected keyword argument"),
    ],
)
def test_a_file_whose_parts_contradict_each_other_is_refused(packed, part, change, names, tmp_path):
    path, matrix = tmp_path / PACKED_FILE, "model.layers.0.mlp.up_proj"
    (tmp_path / "config.json").write_text((packed[0] / "config.json").read_text())
    tensors = load_file(packed[0] / PACKED_FILE)
    with safe_open(packed[0] / PACKED_FILE, "pt") as file:
        about = dict(file.metadata())
    if part == "rows":
        about["matrices"] = about["matrices"].replace("columns", "colums", 1)
    elif change is None:
        del tensors[f"{matrix}.{part}"]
    else:
        tensors[f"{matrix}.{part}"] = change(tensors[f"{matrix}.{part}"])
    save_file(tensors, path, about)
    with pytest.raises(ValueError, match=rf"{PACKED_FILE}: damaged, .*{names}"):
        load_packed(tmp_path)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="expected a file of kind 'packed tiers'"):
        load_packed(tmp_path)


def test_a_folder_without_a_packed_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="packed"):
        load_packed(tmp_path)
