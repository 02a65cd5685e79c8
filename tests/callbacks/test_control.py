"""A recovery beside the dense model tuned alike: one command, the same tuning, and no comparison with another one."""

import json
import os
import sys
from unittest import mock

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))
import main
from callbacks.control import Control, beside
from callbacks.other_text import OtherText
from common.records import record
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.data.toy import Toy, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning calls jsonargparse by an old name
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
]
KEPT = [LayerPlan([0, 2], list(range(0, 48, 2))), LayerPlan([1, 2, 3], list(range(16)))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, it pruned, a text and one of another kind."""
    root = tmp_path_factory.mktemp("control")
    data = Toy(cache_dir=str(root / "cache"))
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=6, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config)
    plan = PruningPlan(KEPT, [[4, 48]] * 2, "toy", "")
    save(root / "dense", dense, data.tokenizer, "# dense")
    save(root / "pruned", slice_model(dense, plan), data.tokenizer, "# pruned", plan)
    (root / "text.json").write_text(json.dumps([{"text": text} for text in sentences(0, 80)]))
    (root / "other.json").write_text(json.dumps([{"text": text[::-1]} for text in sentences(1, 20)]))
    return root


def fit(place, folder, *arguments, control=True, base="pruned", callbacks=()):
    """Run the command in this process; the records that it has written."""
    folder.mkdir(exist_ok=True)
    own = [{"class_path": "Control", "init_args": {"folder": str(place / "tuned")}}] if control else []
    other = {"class_path": "OtherText", "init_args": {"texts": {"other": str(place / "other.json")}, "max_blocks": 4}}
    config = {
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 4, "val_check_interval": 2, "logger": False,
            "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "enable_model_summary": False,
            "callbacks": [
                other, *own, *callbacks,
                {"class_path": "ModelCheckpoint", "init_args": {
                    "dirpath": str(folder / "checkpoints"), "every_n_train_steps": 2, "save_last": True,
                    "save_top_k": 0, "enable_version_counter": False}},
                {"class_path": "RunRecord", "init_args": {"path": str(folder / "r.jsonl"), "run_name": "r"}},
                {"class_path": "HFExport", "init_args": {"dirpath": str(folder / "model")}},
            ],
        },
        "model": {"class_path": "LoraRecovery", "init_args": {
            "base": str(place / base), "teacher": str(place / "dense") if base == "pruned" else None, "rank": 4,
            "learning_rate": 1e-2, "warmup_steps": 0}},
        "data": {"class_path": "TextCorpus", "init_args": {
            "train": str(place / "text.json"), "tokenizer": str(place / "dense"), "block_size": 16, "batch_size": 4,
            "cache_dir": str(place / "cache"), "val_percent": 20}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["main.py", "fit", "--config", str(folder / "config.yaml"), *arguments]
    with mock.patch.object(sys, "argv", argv):
        main.main()
    return record.read(folder / "r.jsonl")[0]


@pytest.fixture(scope="module")
def first(place):
    return fit(place, place / "first")


def test_one_command_tunes_the_dense_model_alike_and_puts_it_beside_every_figure(place, first):
    control, recovered = first
    assert control["run_name"] == "r_control" and recovered["run_name"] == "r"
    alone = fit(place, place / "alone", control=False, base="dense")[0]
    assert control["val_ppl"] == alone["val_ppl"], "the control is what the same command makes of the dense model"
    curve = recovered["val_curve"]
    assert [point["step"] for point in curve] == [0, 2, 4]
    tuned = json.loads((place / "tuned/control.json").read_text())["curve"]
    for point, other in zip(curve, tuned, strict=True):
        for text in ("", "_other"):
            assert point[f"control_ppl{text}"] == other[f"val_ppl{text}"]
            assert point[f"ratio{text}"] == point[f"val_ppl{text}"] / other[f"val_ppl{text}"]
    last = recovered["recovery"]["texts"]
    assert last["validation"]["ppl_control"] == control["val_ppl"] and last["validation"]["ppl"] == recovered["val_ppl"]
    assert (
        last["other"]["ppl_dense"] == tuned[0]["val_ppl_other"] and last["other"]["ratio"] == curve[-1]["ratio_other"]
    )
    assert curve[0]["val_ppl"] != curve[-1]["val_ppl"] and tuned[0]["val_ppl"] != tuned[-1]["val_ppl"]
    assert (place / "tuned/model/config.json").is_file()


def test_a_control_that_is_there_is_taken_and_changes_nothing(place, first):
    again = fit(place, place / "again")
    assert [one["run_name"] for one in again] == ["r"]
    assert again[0]["val_ppl"] == first[1]["val_ppl"], "adapters begin with the same values, whoever ran before"


def test_a_control_that_was_tuned_otherwise_is_refused(place, first, capsys):
    with pytest.raises(SystemExit):
        fit(place, place / "other", "--model.rank", "8")
    said = capsys.readouterr().err
    assert "Control.folder: the dense model in" in said and "(model.rank 4, now 8)" in said
    with pytest.raises(SystemExit):
        fit(place, place / "other", "--trainer.max_steps", "6")
    assert "(trainer.max_steps 4, now 6)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit(place, place / "other", "--model.adapter", str(place / "first/model/adapter"))
    assert "model.adapter: a run that goes on from an adapter has no like" in capsys.readouterr().err
    other = place / "other.json"
    before, when = other.read_text(), other.stat().st_mtime_ns
    other.write_text(before + " ")
    with pytest.raises(SystemExit):
        fit(place, place / "other")
    assert "was tuned otherwise (text files " in capsys.readouterr().err
    other.write_text(before)
    os.utime(other, ns=(when, when))
    text = place / "text.json"
    before = text.read_text()
    text.write_text(before.replace("red", "blue"))
    with pytest.raises(SystemExit):
        fit(place, place / "other")
    assert "was tuned otherwise (text." in capsys.readouterr().err
    text.write_text(before)


def test_a_killed_control_goes_on_where_it_was(place, first, tmp_path, capsys):
    stop = {"class_path": "tests.callbacks.test_control.Stops", "init_args": {}}
    tuned = place / "tuned"
    kept = tuned.rename(place / "kept")
    try:
        with mock.patch("callbacks.control._KEPT", ("Stops", "ModelCheckpoint", "OtherText", "RunRecord")):
            with pytest.raises(RuntimeError, match="killed"):
                fit(place, tmp_path / "one", callbacks=[stop])
            assert not (tuned / "control.json").exists() and list((tuned / "checkpoints").glob("last*"))
            with pytest.raises(SystemExit):  # what was begun otherwise is no like of this
                fit(place, tmp_path / "one", "--model.learning_rate", "0.001")
            assert "was tuned otherwise (model.learning_rate 0.01, now 0.001)" in capsys.readouterr().err
            begun = (tuned / "alike.json").rename(tmp_path / "alike.json")
            with pytest.raises(SystemExit):
                fit(place, tmp_path / "one")
            assert "nothing says how the dense model of the checkpoints" in capsys.readouterr().err
            begun.rename(tuned / "alike.json")
        control, _ = fit(place, tmp_path / "one")
        assert control["resumed_at"] == [2]
        curves = [json.loads((folder / "control.json").read_text())["curve"] for folder in (tuned, kept)]
        resumed, straight = ([point["val_ppl"] for point in curve] for curve in curves)
        assert resumed == straight
    finally:
        if tuned.exists():
            tuned.rename(tmp_path / "done")
        kept.rename(tuned)


class Stops(OtherText):
    """Fails after the second step, once its checkpoint is written."""

    def __init__(self) -> None:
        super().__init__({})

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            raise RuntimeError("killed")


def test_another_vocabulary_and_a_missing_dense_model_are_refused(place, first, tmp_path, capsys):
    config = AutoConfig.from_pretrained(place / "dense", vocab_size=299)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    control = Control(str(tmp_path / "tuned"), str(tmp_path / "dense"))
    model = mock.Mock(base=str(place / "pruned"), teacher_path=None, adapter=None)
    with pytest.raises(ValueError, match=r"Control\.dense: its vocabulary has 299 tokens, the base's has 300"):
        control.check_arguments("fit", model, None)
    with pytest.raises(ValueError, match=r"Control\.dense: give the dense model"):
        Control(str(tmp_path / "tuned")).check_arguments("fit", model, None)
    with pytest.raises(FileNotFoundError, match=r"no control\.json in .*: the dense model is not tuned yet"):
        control.on_train_start(mock.Mock(fast_dev_run=False), mock.Mock())


def test_a_trial_run_tunes_nothing_and_compares_nothing(place, first, tmp_path):
    (place / "tuned/control.json").rename(tmp_path / "control.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/r.jsonl").touch()
    try:
        assert fit(place, tmp_path / "folder", "--trainer.fast_dev_run", "true") == []
        assert not (place / "tuned/control.json").exists()
    finally:
        (tmp_path / "control.json").rename(place / "tuned/control.json")


def test_ratios_are_of_the_same_step_and_text():
    point = {"step": 2, "train_s": 1.0, "val_ppl": 30.0, "val_ppl_books": 50.0}
    assert beside(point, {"val_ppl": 20.0, "val_ppl_books": 40.0}) == {
        "control_ppl": 20.0, "ratio": 1.5, "control_ppl_books": 40.0, "ratio_books": 1.25,
    }  # fmt: skip
    assert beside(point, {"val_ppl": 20.0}) == {"control_ppl": 20.0, "ratio": 1.5}
    assert beside(point, {}) == {}


def test_other_texts_are_checked(tmp_path):
    with pytest.raises(ValueError, match="max_blocks must be at least 1"):
        OtherText({}, 0)
    with pytest.raises(ValueError, match="'a b' is no name"):
        OtherText({"a b": "x.txt"})
    with pytest.raises(FileNotFoundError, match=r"OtherText\.texts\.books: no such file or folder"):
        OtherText({"books": str(tmp_path / "none.txt")}).check_arguments("fit", None, None)
