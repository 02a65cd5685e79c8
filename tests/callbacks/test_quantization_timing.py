"""Fewer bits measured by a validation that writes it down."""

import importlib.util
import json

import lightning.pytorch as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks import QuantizationTiming, RunRecord
from callbacks.quantization_timing import table
from lightning_modules import Pretraining
from lightning_modules.loading import load
from lightning_modules.perplexity import validation_perplexity
from lightning_modules.quantization import weight_bytes
from lightning_modules.structured_pruning.saving import save
from tests.lightning_modules.data.toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install -e '.[quant]'")
def test_both_models_are_measured_as_they_are_and_in_fewer_bits(tmp_path):
    data = Toy(cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    for name, width in (("dense", 96), ("pruned", 64)):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=300, hidden_size=64, intermediate_size=width, num_hidden_layers=2, pad_token_id=0,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        save(tmp_path / name, AutoModelForCausalLM.from_config(config), data.tokenizer, "#")
    timing = QuantizationTiming(
        ["int8", "int4"], str(tmp_path / "dense"), str(tmp_path / "pruned"), prompt_tokens=12, new_tokens=3, repeats=2
    )
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callbacks = [timing, RunRecord(str(tmp_path / "r.jsonl"), "q")]
    trainer = L.Trainer(accelerator="cpu", precision="bf16-true", limit_val_batches=1, callbacks=callbacks, **quiet)
    trainer.validate(Pretraining(pretrained=str(tmp_path / "pruned")), data, verbose=False)
    rows = json.loads((tmp_path / "r.jsonl").read_text())["quantization"]
    forms = ["bfloat16", "int8", "int4"]
    assert [(row["model"], row["weights"]) for row in rows] == [(m, f) for m in ("dense", "pruned") for f in forms]
    for model, three in (("dense", rows[:3]), ("pruned", rows[3:])):
        plain = load(tmp_path / model, "bfloat16")
        assert three[0]["weight_bytes"] == weight_bytes(plain) > three[1]["weight_bytes"] > three[2]["weight_bytes"]
        assert three[0]["ppl"] == pytest.approx(validation_perplexity(plain, data))
        assert abs(three[1]["ppl"] / three[0]["ppl"] - 1) < 0.05
        assert len({row["ppl"] for row in three}) == 3
        assert all(row["decode_ms"] > 0 and row["speedup"] > 0 for row in three)
    assert rows[0]["speedup"] == 1
    assert len(table(rows).rows) == 6


def test_arguments_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="new_tokens must be at least 1"):
        QuantizationTiming(new_tokens=0)
    with pytest.raises(ValueError, match="repeats must not be negative"):
        QuantizationTiming(repeats=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package torchao"):
        QuantizationTiming().check_arguments("validate", None, None)
    QuantizationTiming().check_arguments("fit", None, None)
