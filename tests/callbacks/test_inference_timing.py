"""Latency of two real folders, measured by a validation that writes it down."""

import json

import lightning.pytorch as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks import InferenceTiming, RunRecord
from callbacks.inference_timing import decoding
from lightning_modules import Pretraining
from lightning_modules.structured_pruning import StructuredPruning
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.data.toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13


def test_validation_measures_both_models_and_writes_a_record(tmp_path):
    data = Toy(cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=6, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config)
    plan = PruningPlan([LayerPlan([0, 2], list(range(24)))] * 2, [[4, 48]] * 2, "toy", "")
    save(tmp_path / "dense", dense, data.tokenizer, "#")
    save(tmp_path / "pruned", slice_model(dense, plan), data.tokenizer, "#", plan)
    timing = InferenceTiming(
        str(tmp_path / "dense"), str(tmp_path / "pruned"), prompt_tokens=12, new_tokens=3, batch_sizes=[1, 2], repeats=2
    )
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callbacks = [timing, RunRecord(str(tmp_path / "r.jsonl"), "timing")]
    trainer = L.Trainer(accelerator="cpu", limit_val_batches=1, callbacks=callbacks, **quiet)
    trainer.validate(Pretraining(pretrained=str(tmp_path / "pruned")), data, verbose=False)
    rows = json.loads((tmp_path / "r.jsonl").read_text())["inference"]["rows"]
    assert [(row["phase"], row["batch"]) for row in rows] == [(p, b) for b in (1, 2) for p in ("prefill", "decode")]
    layer = 32 * (8 + 4 + 4 + 8) * 6 + 3 * 32 * 48
    for row in rows:
        assert row["dense_ms"] > 0 and row["pruned_ms"] > 0
        assert row["dense_kv_bytes"] == 2 * row["pruned_kv_bytes"] == row["batch"] * 15 * 2 * 2 * 4 * 6 * 4
        if row["phase"] == "decode":
            assert row["work_dense"]["flops"] == pytest.approx(row["batch"] * 2 * (2 * layer + 300 * 32), rel=0.02)
            assert row["flop_bound"] == pytest.approx((2 * layer + 9600) / (layer + 9600), rel=0.01)


def test_what_was_decoded_is_forgotten_beyond_a_sliding_window_too():
    config = AutoConfig.for_model(
        "mistral", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    said = []
    model.register_forward_hook(lambda module, given, output: said.append(output.logits[0, -1]))
    decode = decoding(model, torch.arange(40)[None], 3)
    for _ in range(2):
        decode()
    assert len(said) == 1 + 2 * 3
    for first, again in zip(said[1:4], said[4:], strict=True):
        torch.testing.assert_close(first, again)


def test_models_that_cannot_be_timed_are_refused_before_the_validation(tmp_path):
    config = AutoConfig.for_model("llama", max_position_embeddings=64, num_hidden_layers=1)
    config.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="more than the 64 positions of the dense model"):
        InferenceTiming(str(tmp_path / "small"), "b", prompt_tokens=60, new_tokens=5).setup(None, None, "validate")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        timing = InferenceTiming(str(tmp_path / "small"), str(tmp_path / "nowhere"), prompt_tokens=60, new_tokens=4)
        timing.setup(None, None, "validate")


def test_models_that_are_not_named_are_the_modules_own(tmp_path):
    config = AutoConfig.for_model("llama", max_position_embeddings=64, num_hidden_layers=1)
    for name in ("whole", "cut"):
        config.save_pretrained(tmp_path / name)
    timing = InferenceTiming(prompt_tokens=4)
    timing.setup(None, StructuredPruning(str(tmp_path / "whole"), str(tmp_path / "cut")), "validate")
    assert timing.folders == {"dense": str(tmp_path / "whole"), "pruned": str(tmp_path / "cut")}
    with pytest.raises(ValueError, match=r"InferenceTiming\.dense: give its folder; Pretraining has none"):
        InferenceTiming().setup(None, Pretraining(), "validate")


def test_arguments_are_checked():
    for arguments, name in (({"repeats": 0}, "repeats"), ({"batch_sizes": []}, "batch_sizes")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            InferenceTiming("a", "b", **arguments)
    assert torch.is_grad_enabled()
