"""One loader for folders, GGUF files and names, and what it says when something is wrong."""

import json
import os
import sys
from types import SimpleNamespace

import gguf
import pytest
import torch

from common import manifest
from common.manifest import DamagedError
from lightning_modules import loading
from lightning_modules.block_sparsity.packed_model import write_packed
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.data.tokenizer import load_tokenizer as data_tokenizer
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.loading import check_vocabulary, load, load_config, load_on_meta, load_tokenizer
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules import gguf_file
from tests.lightning_modules.structured_pruning.toy import ids, plan_for, tiny


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog. "] * 50, 300)


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_dtype_and_attention_reach_the_model(folder):
    assert load(folder).dtype == torch.float32
    model = load(folder, "bfloat16", "eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not model.training
    tiny(dtype=torch.float16).save_pretrained(folder)
    assert load(folder).dtype == torch.float32 and load(folder, "auto").dtype == torch.float16


def test_a_file_beside_a_model_is_found_on_the_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub/models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--owner--name/refs").mkdir()
    (tmp_path / "hub/models--owner--name/refs/main").write_text("abc")
    (snapshot / "tiers.map").write_text("maps")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = loading.hub_file("owner/name", "tiers.map")
    assert found is not None and found.read_text() == "maps"
    assert loading.hub_file("owner/name", "another.map") is None


@pytest.mark.parametrize(("flags", "wanted"), [
    (["avx2", "avx512_bf16"], torch.bfloat16),
    (["avx2", "avx512f"], torch.float32),
    (["asimd"], torch.bfloat16),
])  # fmt: skip
def test_fast_is_what_the_processor_has_instructions_for(flags, wanted, folder, monkeypatch):
    monkeypatch.setattr(loading, "isa_flags", lambda: flags)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    tiny(dtype=torch.bfloat16).save_pretrained(folder)
    assert load(folder, "fast").dtype == wanted and load(folder, "auto").dtype == torch.bfloat16
    with torch.device("meta"):
        assert load(folder, "fast").dtype == wanted
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert load(folder, "fast").dtype == torch.bfloat16


def test_pruned_and_packed_folders_load_like_any_other(tmp_path, tokenizer):
    dense = tiny()
    pruned = slice_model(dense, plan_for(dense))
    save(tmp_path / "pruned", pruned, tokenizer, "# card")
    assert torch.equal(load(tmp_path / "pruned")(ids()).logits, pruned(ids()).logits)
    assert load(tmp_path / "pruned", "bfloat16", "eager").config._attn_implementation == "eager"

    pruner = Pruner(dense, block=4, k=2)
    (tmp_path / "packed").mkdir()
    write_packed(tmp_path / "packed", dense, dense.state_dict(), pruner.tiers, "bfloat16")
    packed = load(tmp_path / "packed", attention="eager")
    assert packed.dtype == torch.float32 and packed.config._attn_implementation == "eager"
    assert load(tmp_path / "packed", "auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"device_map.*packed"):
        load(tmp_path / "packed", device_map="auto")


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_read_and_can_be_saved_again(tmp_path, tokenizer, tied):
    model = tiny(vocab_size=320, hidden_size=64, intermediate_size=96, head_dim=8, tie_word_embeddings=tied)
    gguf_file.write(tmp_path / "model.gguf", model, tokenizer)
    read = load(tmp_path / "model.gguf")
    torch.testing.assert_close(read(ids()).logits, model(ids()).logits)
    read.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(ids()).logits, read(ids()).logits)

    text = "the quick dog, été <b>"
    found = load_tokenizer(tmp_path / "model.gguf")
    assert found(text).input_ids == tokenizer(text).input_ids
    assert data_tokenizer(str(tmp_path / "model.gguf")).get_vocab() == found.get_vocab()  # as data.tokenizer too
    found.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(text).input_ids == tokenizer(text).input_ids


def test_quantised_gguf_weights_are_expanded(tmp_path, tokenizer):
    model = tiny(vocab_size=320, hidden_size=64, intermediate_size=96, head_dim=8)
    gguf_file.write(tmp_path / "model.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)
    read = load(tmp_path / "model.gguf", "bfloat16")
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
    weight, wanted = read.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    assert 0 < (weight.float() - wanted).abs().max() < wanted.abs().max() / 100
    read.save_pretrained(tmp_path / "saved")  # a quantised model could not be
    assert load_config(tmp_path / "model.gguf").num_hidden_layers == 4


def test_without_the_package_gguf_the_message_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    gguf_file.write(tmp_path / "model.gguf", tiny(vocab_size=320, head_dim=8), tokenizer)
    monkeypatch.setattr("transformers.utils.import_utils._is_package_available", lambda *_, **__: (False, "0"))
    for name in [name for name in sys.modules if name == "gguf" or name.startswith("gguf.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"model\.gguf.*pip install -e '\.\[gguf\]'"):
        load(tmp_path / "model.gguf")


def test_what_is_not_there_is_said_with_what_to_do(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no model 'nobody/nothing'.*HF_HUB_OFFLINE.*hf download nobody"):
        load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*/none"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
    (folder.parent / "some.gguf").touch()
    with pytest.raises(ValueError, match=r"name the file, .*some\.gguf"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is a file: give the folder"):
        load(folder / "config.json")
    with pytest.raises(ValueError, match=r"dtype must be one of auto, fast, float32.*int8"):
        load(folder, "int8")
    with pytest.raises(ValueError, match="attention 'flush'"):
        load(folder, attention="flush")
    with pytest.raises(ValueError, match="only 2"):
        load(folder, supported=lambda config: _only_two(config))


def _only_two(config):
    if config.num_hidden_layers != 2:
        raise ValueError("only 2 layers")


def test_damaged_and_incomplete_folders_are_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    for field, value in (("num_hidden_layers", 5), ("intermediate_size", 64)):
        (folder / "config.json").write_text(json.dumps(fields | {field: value}))
        with pytest.raises(ValueError, match=r"weights are missing or of other shapes.*model\.layers\."):
            load(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model: weights are cut short or damaged"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model cannot be loaded: .*model\.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load(folder)


def test_a_changed_file_in_what_pare_wrote_is_named(tmp_path, tokenizer):
    save(tmp_path / "model", tiny(), tokenizer, "# card")
    weights = bytearray((tmp_path / "model/model.safetensors").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "model/model.safetensors").write_bytes(weights)
    with pytest.raises(DamagedError, match=r"model\.safetensors is not what was written"):
        load(tmp_path / "model")


def test_a_folder_whose_replacement_was_killed_is_found(tmp_path, tokenizer):
    save(tmp_path / "model", tiny(), tokenizer, "# card")
    (tmp_path / "model").rename(tmp_path / ".model.old")
    assert load(tmp_path / "model").num_parameters() == tiny().num_parameters()


def test_the_tokenizer_is_beside_the_weights_or_named_by_the_data(folder, tokenizer):
    data = SimpleNamespace(named_tokenizer=object())
    assert load_tokenizer(folder, data).get_vocab() == tokenizer.get_vocab()
    (folder / "tokenizer.json").write_text("{}")
    assert load_tokenizer(folder, data) is data.named_tokenizer
    for damage in (lambda file: None, lambda file: file.unlink()):
        damage(folder / "tokenizer.json")
        for without in (None, SimpleNamespace(named_tokenizer=None)):
            with pytest.raises(ValueError, match=r"model has no tokenizer.*data\.tokenizer"):
                load_tokenizer(folder, without)
    assert load_tokenizer("nobody/model-without-one", data) is data.named_tokenizer  # the Hub has no tokenizer of it
    with pytest.raises(FileNotFoundError, match="no model 'nobody/model-without-one'"):
        load_tokenizer("nobody/model-without-one")


def test_one_rank_of_a_node_reads_all_that_pare_wrote_and_every_rank_its_sizes(tmp_path, tokenizer, monkeypatch):
    save(tmp_path / "model", tiny(), tokenizer, "# card")
    read = []
    monkeypatch.setattr(manifest, "_sha256", lambda path, real=manifest._sha256: read.append(path.name) or real(path))
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        read.clear()
        load(tmp_path / "model")
        assert read.count("model.safetensors") == times
    os.truncate(tmp_path / "model/model.safetensors", 100)
    with pytest.raises(DamagedError, match=r"model\.safetensors has 100 bytes"):
        load(tmp_path / "model")


def test_text_in_another_models_tokens_is_refused(tmp_path, tokenizer):
    """A smaller or a foreign vocabulary fits into the embedding, and would give a perplexity of nothing."""
    folder = tmp_path / "model"
    tiny(vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load(folder)
    check_vocabulary(model, None)
    check_vocabulary(model, tokenizer)
    check_vocabulary(load_on_meta(folder), tokenizer)
    padded = load_tokenizer(folder)
    padded.add_special_tokens({"pad_token": "<pad>"})
    check_vocabulary(model, padded)  # what a token was added to is still the model's
    gguf_file.write(tmp_path / "m.gguf", tiny(vocab_size=320, head_dim=8), tokenizer)
    bare = tmp_path / "bare"
    model.save_pretrained(bare)
    for text, size in (("a foreign language, of other words. ", 300), ("the quick brown fox jumps over. ", 270)):
        wrong = train_bpe([text] * 50, size)
        assert len(wrong) <= 320
        check_vocabulary(load(bare), wrong)  # nothing says what its tokens are
        for read in (model, load_on_meta(folder), load(tmp_path / "m.gguf")):
            with pytest.raises(ValueError, match=r"is not the one of .*tokens have other numbers.*use the model's own"):
                check_vocabulary(read, wrong)
    with pytest.raises(ValueError, match="has 400 tokens but the model embeds only 320"):
        check_vocabulary(model, range(400))


def test_the_folder_that_one_stands_in_is_a_model_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for here in (".", "./"):
        assert load_config(here).model_type == load_config(folder).model_type
