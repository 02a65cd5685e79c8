"""Pruned models save, load, generate, train and are pruned again like any other."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.loading import load, load_on_meta
from lightning_modules.structured_pruning.export import largest_difference, pad_to_stock
from lightning_modules.structured_pruning.layers import family
from lightning_modules.structured_pruning.plan import FILE, LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.verify import compare, reference_logits
from tests.lightning_modules.structured_pruning.toy import DROPPED, FAMILIES, KEPT, ids, plan_for, tiny


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([["the quick brown fox jumps over the lazy dog " * 20]]), 300)


def _saved(folder: Path, tokenizer, name: str = "llama", kept: list[LayerPlan] = KEPT, **fields):
    dense = tiny(name, **fields)
    plan = plan_for(dense, kept)
    pruned = slice_model(dense, plan)
    save(folder, pruned, tokenizer, "# card", plan)
    return pruned


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kept", [KEPT, DROPPED, [KEPT[1]] * 4], ids=["parts", "a whole layer", "alike"])
def test_reload_in_one_call_is_bit_identical(name, kept, tmp_path, tokenizer):
    pruned = _saved(tmp_path / "model", tokenizer, name, kept)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load(tmp_path / "model")):
        assert type(again) is type(pruned) and again.config._attn_implementation == "sdpa"
        assert torch.equal(again(ids()).logits, pruned(ids()).logits)
    assert model_hash(load(tmp_path / "model")) == model_hash(pruned)
    assert PruningPlan.load(tmp_path / "model" / FILE).layers == kept
    assert load_on_meta(tmp_path / "model").num_parameters() == pruned.num_parameters()
    config = (tmp_path / "model/config.json").read_text()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == config


def test_tied_embeddings_stay_tied(tmp_path, tokenizer):
    _saved(tmp_path / "model", tokenizer, tie_word_embeddings=True)
    model = load(tmp_path / "model")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_foreign_process_needs_only_trust_remote_code(tmp_path, tokenizer):
    pruned = _saved(tmp_path / "model", tokenizer)
    save_file({"logits": pruned(ids()).logits.detach(), "ids": ids()}, tmp_path / "expected.safetensors")
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\nfrom safetensors.torch import load_file\n"
        f"expected = load_file({str(tmp_path / 'expected.safetensors')!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "assert torch.equal(model(expected['ids']).logits, expected['logits'])\n"
        "assert not any(name.startswith('lightning') for name in sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_every_cache_and_attention_is_the_same(name):
    dense = tiny(name, torch.float64)
    model = slice_model(dense, plan_for(dense))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    greedy = model.generate(ids(), use_cache=False, **options)
    assert torch.equal(model.generate(ids(), **options), greedy)
    static = model.generate(ids(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, greedy)
    cache = model(ids(), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [4, 2, 3, 1]
    logits = model(ids()).logits
    model.set_attn_implementation("eager")
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in model.model.layers)
    assert torch.allclose(model(ids()).logits, logits, atol=1e-4)  # eager's softmax is in float32


# peft 0.21 still asks transformers by the old name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_trains_saves_and_merges(tmp_path, tokenizer):
    _saved(tmp_path / "model", tokenizer)
    model = load(tmp_path / "model")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = lora(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lora.eval().save_pretrained(tmp_path / "adapter")
    logits = lora(input_ids=ids()).logits
    again = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
    merged = again.merge_and_unload().eval()
    save(tmp_path / "merged", merged, tokenizer, "# merged")
    assert torch.allclose(load(tmp_path / "merged")(ids()).logits, logits, atol=1e-4)


def test_a_pruned_model_is_pruned_again():
    dense = tiny("qwen2")
    once = slice_model(dense, plan_for(dense))
    kept = [LayerPlan(list(range(max(1, len(layer.groups) - 1))), list(range(8))) for layer in KEPT]
    plan = plan_for(once, kept)
    twice = slice_model(once, plan)
    compare(*reference_logits(once, plan, ids()), twice, ids(), 1e-6).raise_if_failed()
    assert [layer.num_key_value_heads for layer in twice.config.per_layer_config] == [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("name", "fields", "stock"),
    [
        ("llama", {}, "MistralForCausalLM"),
        ("llama", {"attention_bias": True, "head_dim": 4}, "LlamaForCausalLM"),
        ("qwen2", {}, "Qwen2ForCausalLM"),
        ("mistral", {}, "MistralForCausalLM"),
    ],
)
def test_portable_export_is_a_stock_class_with_the_same_logits(name, fields, stock, tmp_path, tokenizer):
    dense = tiny(name, **fields)
    pruned = slice_model(dense, plan_for(dense, [KEPT[1], KEPT[2], KEPT[3], KEPT[3]]))
    padded = pad_to_stock(pruned)
    save(tmp_path / "stock", padded.model, tokenizer, "# stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(again).__name__ == stock and type(again).__module__.startswith("transformers.")
    assert largest_difference(pruned, again, ids()) <= 1e-5
    assert 0 < padded.padding == again.num_parameters() - pruned.num_parameters()


def test_heads_are_padded_until_stock_llama_accepts_them():
    dense = tiny("llama", attention_bias=True)
    padded = pad_to_stock(slice_model(dense, plan_for(dense, [KEPT[2]] * 4)))  # 6 heads do not divide 32, but 8 do
    assert padded.model.config.num_attention_heads == 8 and padded.padding > 0
    assert pad_to_stock(slice_model(dense, plan_for(dense, [KEPT[1]] * 4))).padding == 0


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    for loader in (load, load_on_meta):
        with pytest.raises(ValueError, match=r"'gpt2' is not supported.*llama, mistral, qwen2"):
            loader(tmp_path / "gpt2", supported=family)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path)


def test_the_old_folder_survives_a_full_disk(tmp_path, tokenizer, monkeypatch):
    pruned = _saved(tmp_path / "model", tokenizer)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match=r"the disk is full.*the earlier one is still there"):
        save(tmp_path / "model", pruned, tokenizer, "# new")
    assert (tmp_path / "model/README.md").read_text() == "# card"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load(tmp_path / "model")(ids()).logits, pruned(ids()).logits)


def test_a_configuration_without_key_value_heads_is_refused(tmp_path, tokenizer):
    _saved(tmp_path / "model", tokenizer)
    path = tmp_path / "model/config.json"
    fields = json.loads(path.read_text())
    fields["per_layer_config"]["1"]["num_key_value_heads"] = 3
    path.write_text(json.dumps(fields))
    with pytest.raises(Exception, match="layer 1: 4 query heads do not divide among 3"):
        AutoConfig.from_pretrained(tmp_path / "model")
