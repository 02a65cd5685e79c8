"""Ways of making a model cheaper added up by one validation, which writes down what each contributes."""

import json

import lightning.pytorch as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks import Ladder, RunRecord
from callbacks.ladder import tables
from lightning_modules import Pretraining
from lightning_modules.loading import load
from lightning_modules.structured_pruning.saving import save
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from tests.lightning_modules.data.toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dense and a narrower model, the record of their ladder, and what was loaded and made for it."""
    folder = tmp_path_factory.mktemp("ladder")
    data = Toy(cache_dir=str(folder / "cache"))
    data.prepare_data()
    data.setup("fit")
    for name, width in (("dense", 96), ("narrow", 48)):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=300, hidden_size=64, intermediate_size=width, num_hidden_layers=3, pad_token_id=0,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        save(folder / name, AutoModelForCausalLM.from_config(config), data.tokenizer, "#")
    ladder = Ladder(
        models={"structure": str(folder / "narrow")}, scorer=LastWindow(window=2),
        schedule=Schedule(layers=[0, 1], keep=0.5, sinks=1, tail=0.0, min_tail=2),
        windows=3, suffix=4, facts=2, lengths=[20], max_new_tokens=2, prompt_tokens=32, new_tokens=2, repeats=3,
    )  # fmt: skip
    made = []

    def loaded(path, *rest):
        made.append(path)
        return load(path, *rest)

    def planted(texts, tokenizer, lengths, count, split):
        made.append(split)  # the toy's tokenizer says no such things in so few tokens
        ids = torch.arange(1, 1 + lengths[0])
        return [Asked(ids, ids < 0, "nothing", "code", 0.5)] * count

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callbacks = [ladder, RunRecord(str(folder / "r.jsonl"), "ladder")]
    trainer = L.Trainer(accelerator="cpu", limit_val_batches=1, callbacks=callbacks, **quiet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("callbacks.ladder.load", loaded)
        patch.setattr("callbacks.ladder.plant", planted)
        trainer.validate(Pretraining(pretrained=str(folder / "dense")), data, verbose=False)
    return folder, json.loads((folder / "r.jsonl").read_text()), made


def test_models_are_loaded_and_prompts_made_once_for_all_rungs(written):
    folder, record, made = written
    assert made == [str(folder / "dense"), str(folder / "narrow"), "test"]
    assert [row["asked"] for row in record["ladder"]["rungs"]] == [2, 2, 2]


def test_each_rung_has_the_one_before_inside(written):
    folder, record, _ = written
    rows = record["ladder"]["rungs"]
    assert [row["rung"] for row in rows] == ["dense", "structure", "tokens"]
    assert [row["model"] for row in rows] == [str(folder / name) for name in ("dense", "narrow", "narrow")]
    assert rows[0]["nll_rise"] == 0 and len({row["nll"] for row in rows}) == 3
    dense, narrow = (load(folder / name) for name in ("dense", "narrow"))
    assert rows[0]["parameters"] == dense.num_parameters() > rows[1]["parameters"] == narrow.num_parameters()
    assert rows[1]["file_bytes"] == (folder / "narrow/model.safetensors").stat().st_size == rows[2]["file_bytes"]
    # the cache holds 32 tokens in layer 0, then half and a quarter of the 29 that may go, and the 3 that may not
    assert rows[0]["kv_bytes"] == rows[1]["kv_bytes"] == 3 * 32 * 2 * 4 * 8 * 4
    assert rows[2]["kv_bytes"] == (32 + 18 + 11) * 2 * 4 * 8 * 4


def test_bounds_follow_from_what_is_left(written):
    _, record, _ = written
    rows = record["ladder"]["rungs"]
    assert rows[0]["prefill_bound"] == rows[0]["decode_bound"] == rows[0]["prefill_speedup"] == 1
    assert 1 < rows[1]["prefill_bound"] < rows[2]["prefill_bound"]
    assert 1 < rows[1]["decode_bound"] < rows[2]["decode_bound"]
    assert all(row[f"{phase}_ms"] > 0 and row[f"{phase}_gain"] > 0 for row in rows for phase in ("prefill", "decode"))
    assert rows[1]["decode_gain"] == rows[1]["decode_speedup"]  # before it stands the dense model
    costs, speeds, sizes = tables(rows)
    assert [row[0] for row in costs.rows] == [row[0] for row in speeds.rows] == ["dense", "structure", "tokens"]
    assert speeds.rows[0][1] == "1.00 ×" and sizes.rows[2][2] == "0.0 MB"
    assert tables([{**rows[0], "right": 0.5}])[0].rows[0][3] == "50.0 %"


def test_impossible_ladders_are_refused(written):
    folder, _, _ = written
    with pytest.raises(ValueError, match="nothing to add up"):
        Ladder()
    with pytest.raises(ValueError, match="tokens names another rung"):
        Ladder(models={"tokens": "x"})
    with pytest.raises(ValueError, match="suffix must be at least 1"):
        Ladder(models={"a": "x"}, suffix=0)
    dense = str(folder / "dense")
    module = Pretraining(pretrained=dense)
    with pytest.raises(ValueError, match="reads 64 tokens, not 116"):
        Ladder(models={"a": dense}, prompt_tokens=100).check_arguments("validate", module, None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Ladder(models={"a": "./nowhere"}, prompt_tokens=32).check_arguments("validate", module, None)
    Ladder(models={"a": "./nowhere"}).check_arguments("fit", module, None)
    with pytest.raises(ValueError, match="give its folder"):
        Ladder(models={"a": dense}).check_arguments("validate", object(), None)
    rows = [{"rung": "a", "prefill_speedup": 2.0, "prefill_bound": 1.5, "decode_speedup": 1.6, "decode_bound": 1.5}]
    ladder = Ladder(models={"a": dense})
    ladder.rows = rows
    assert ladder.summary()["suspicious"] == ["a: prefill 2.00 × is above its bound of 1.50 ×"]
