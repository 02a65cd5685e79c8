"""Building, exporting and talking to models."""

import math
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import inputs_of, replacing
from common.names import clean_name
from lightning_modules import generation
from lightning_modules.block_sparsity import BlockSparsity
from lightning_modules.causal_lm import whole_steps
from lightning_modules.data.recall import Recall
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.export import export
from lightning_modules.loading import load, load_tokenizer
from lightning_modules.pretraining import Pretraining
from tests.conftest import ROOT

GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([["the quick brown fox jumps over the lazy dog " * 20]]), 300)


def _attach(module: Pretraining, tokenizer, block_size: int = 32) -> Pretraining:
    """Give a module the little of a Trainer that building a model looks at."""
    data = SimpleNamespace(tokenizer=tokenizer, block_size=block_size)
    module._trainer = SimpleNamespace(
        datamodule=data, precision="32-true", precision_plugin=None, estimated_stepping_batches=10
    )
    return module


@pytest.mark.parametrize(("model_type", "config"), [("gpt2", GPT2), ("llama", LLAMA)])
def test_any_architecture_takes_its_sizes_from_the_data(model_type, config, tokenizer):
    module = _attach(Pretraining(model_type=model_type, config=config), tokenizer)
    module.configure_model()
    assert module.model.config.vocab_size == 320 and module.model.config.max_position_embeddings == 32
    assert module.model.config.eos_token_id == tokenizer.eos_token_id
    first = module.model
    module.configure_model()
    assert module.model is first


def test_default_is_gpt2_of_about_62_million(tokenizer):
    module = _attach(Pretraining(), tokenizer)
    with torch.device("meta"):
        config = module.architecture()
    config.vocab_size = 50257
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    assert 60e6 < count < 66e6


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_one_device_clips_gradients_in_every_precision(precision):
    module = Pretraining(model_type="llama", config=LLAMA, learning_rate=1e-2)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    run = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        precision=precision,
        gradient_clip_val=0.1,
        limit_val_batches=0,
        **quiet,
    )
    run.fit(module, Recall(batch_size=4))
    norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    assert 0 < norm <= 0.1 + 1e-5


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"model_type": "gpt22"}, "gpt22"),
        ({"config": {"n_layers": 2}}, "n_layers"),
        ({"config": {**GPT2, "n_positions": 8}}, "block_size"),
        ({"config": {**GPT2, "vocab_size": 100}}, "tokenizer"),
    ],
)
def test_what_is_wrong_is_named(arguments, names, tokenizer):
    module = _attach(Pretraining(**arguments), tokenizer)
    with pytest.raises(ValueError, match=names):
        module.configure_model()


def test_learning_rate_must_be_positive():
    with pytest.raises(ValueError, match="learning_rate"):
        Pretraining(learning_rate=0)


def test_only_matrices_decay(tokenizer):
    module = _attach(Pretraining(config=GPT2), tokenizer)
    module.configure_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert groups[0]["weight_decay"] == 0.1 and all(p.ndim == 2 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0.0 and all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(module.model.parameters()))


def test_wrappers_do_not_hide_a_name():
    wrapped = "_fsdp_wrapped_module.model.transformer.h.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.weight"
    assert clean_name(wrapped) == "model.transformer.h.0.mlp.weight"


def _export(folder, tokenizer, card="# card"):
    module = _attach(Pretraining(config=GPT2), tokenizer)
    module.configure_model()
    with replacing(folder, "model") as beside:
        export(beside, module.model.state_dict(), module.model.config, tokenizer, card)
    return module.model


def test_export_round_trips_exactly(tmp_path, tokenizer):
    model = _export(tmp_path / "model", tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(10)[None]
    assert torch.equal(model.eval()(ids).logits, again(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "model/README.md").read_text() == "# card"


def test_what_ends_a_text_goes_along_with_the_weights(tmp_path, tokenizer):
    _export(tmp_path / "model", tokenizer)
    module = Pretraining(pretrained=str(tmp_path / "model"), dtype="bfloat16", attention="eager")
    module.configure_model()
    assert module.model.training  # with its dropout
    assert module.model.dtype == torch.bfloat16 and module.model.config._attn_implementation == "eager"
    module.model.generation_config.eos_token_id = [3, 5]
    module.write_export(tmp_path / "again", module.model.state_dict(), tokenizer, "# card")
    assert load(tmp_path / "again").generation_config.eos_token_id == [3, 5]
    assert load(tmp_path / "again", "auto").dtype == torch.bfloat16


def test_export_replaces_only_when_complete(tmp_path, tokenizer):
    model = _export(tmp_path / "model", tokenizer, "# first")
    incomplete = {k: v for k, v in model.state_dict().items() if "h.1" not in k}
    with pytest.raises(ValueError, match=r"h\.1"), replacing(tmp_path / "model", "model") as beside:
        export(beside, incomplete, model.config, tokenizer, "# second")
    assert (tmp_path / "model/README.md").read_text() == "# first"
    _export(tmp_path / "model", tokenizer, "# third")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_streamed_continuation_is_what_generate_returns(tmp_path, tokenizer, capsys):
    _export(tmp_path / "model", tokenizer)
    model, loaded = load(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    text = generation.stream(model, loaded, "the quick", temperature=0, top_p=1.0, max_new_tokens=4)
    assert text.strip() == capsys.readouterr().out.strip()


def test_too_long_an_answer_is_refused(tmp_path, tokenizer):
    _export(tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generation.stream(load(tmp_path / "model"), tokenizer, "a", temperature=0, top_p=1.0, max_new_tokens=32)


SMALL = ROOT.parent / "shared/models/llama-gqa-8m"


@pytest.mark.skipif(not SMALL.is_dir(), reason="the trained Llama is not beside this checkout")
def test_a_trained_model_is_loaded_and_predicts_english():
    module = Pretraining(pretrained=str(SMALL))
    module.configure_model()
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    ids = tokenizer("It was the best of times, it was the worst of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert module.model(ids, labels=ids).loss < 6  # an untrained model of 4,096 tokens is at 8.3


def test_no_export_takes_the_place_of_what_a_module_reads():
    module = BlockSparsity("base", teacher="dense")
    assert {"base", "dense"} <= set(map(str, inputs_of(module))) and Pretraining(pretrained="base").inputs() == ["base"]


def test_only_a_schedule_without_an_end_can_do_without_a_length():
    endless = SimpleNamespace(estimated_stepping_batches=math.inf)
    assert whole_steps(SimpleNamespace(estimated_stepping_batches=7), "cosine") == 7
    assert whole_steps(endless, "constant_with_warmup") == 0
    with pytest.raises(ValueError, match=r"trainer.max_steps: .* 'cosine' needs to know how long training is"):
        whole_steps(endless, "cosine")
