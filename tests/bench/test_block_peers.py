"""Every peer is asked for what its name says, and its model goes once it is measured."""

import json

import pytest
import torch

from bench.experiments import block_million, block_official, block_tuning
from bench.experiments import block_peers as peers
from lightning_modules.block_sparsity.schedules.csv_file import CsvSchedule
from tests.conftest import ROOT
from tests.lightning_modules.block_sparsity.toy import tiny_llama


@pytest.fixture
def stood_in(tmp_path, monkeypatch):
    """Folder, model and texts; and what `main.py` is asked for and what is appended, the runs being stood in for."""
    asked, appended = {}, []

    def once(place, command, config, *arguments):
        place.mkdir(parents=True, exist_ok=True)
        asked[place.parent.name] = (command, config, dict(zip(arguments[::2], arguments[1::2], strict=True)))
        (place.parent / "model").mkdir()
        (place.parent / "model/weights").write_text("half a gigabyte")
        (place / "runs/block_sparsity/checkpoints").mkdir(parents=True)
        return {"tiers": {"iterations": [{"dense": 0.5, "ppl": 30.0}], "sparsity": 0.4}}

    def validated(place, config, *arguments):
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        dense = options["--model.pretrained"].endswith("chat")
        assert dense or (place.parent / "model/weights").exists()
        return 10.0 if dense else 15.0 if "-dense" in str(place) else 18.0 if "progressive" in str(place) else 30.0

    monkeypatch.setattr(peers, "once", once)
    monkeypatch.setattr(peers, "validated", validated)
    monkeypatch.setattr(block_tuning, "losses", lambda place: dict.fromkeys(range(20, 55), 1.0))
    monkeypatch.setattr(peers.figures, "append", lambda records, **figure: appended.append(figure))
    (tmp_path / "chat").mkdir()
    texts = {}
    for name in ("wiki", "books"):
        texts[name] = tmp_path / f"{name}.json"
        texts[name].write_text(json.dumps([{"text": f"{name} {i}"} for i in range(4)]))
    return (tmp_path / "records.jsonl", tmp_path / "work", tmp_path / "chat", texts), asked, appended


def test_arms_are_asked_for_by_seed_and_their_models_go(stood_in):
    places, asked, appended = stood_in
    peers.run(*places)
    assert len(asked) == sum(len(arm.seeds) for arm in peers.arms().values())
    assert not list(places[1].glob("*/model")) and not list(places[1].rglob("checkpoints"))
    for name, (command, _, options) in asked.items():
        assert command == "prune" and options["--model.calibration_seed"] == options["--seed_everything"] == name[-1]
    _, _, wanda = asked["2:4-wanda-1"]
    assert (wanda["--model.score"], wanda["--model.update"], wanda["--model.pattern"]) == ("Wanda", "null", "2:4")
    _, _, sparsegpt = asked["4:8-sparsegpt-1"]
    assert (sparsegpt["--model.score"], sparsegpt["--model.update"]) == ("ObsSaliency", "Obs")
    _, _, last = asked["tiers-5-magnitude-1"]
    shares = [float(last[f"--model.schedule.{tier}"]) for tier in ("dense", "mid_2_4", "topk")]
    assert shares == [0.35, 0.45, 0.2] and last["--model.pattern"] == "tiers"
    assert asked["mix-last-row-3"][2]["--model.topk"] == "auto"
    with_topk = asked["mix-top-32-1"][2]
    assert (with_topk["--model.topk"], with_topk["--model.target_bits"]) == ("32", "9.85")
    assert float(asked["mix-small-1"][2]["--model.target_bits"]) < peers.arms()["2:4-wanda"].bits
    ratios = {figure["figure"]: figure["value"] for figure in appended}
    assert ratios["dense-wiki"] == 1 and ratios["2:4-wanda-books"] == 3
    json.dumps(appended, allow_nan=False)


def test_all_ways_of_tuning_have_as_many_epochs_and_tokens(stood_in):
    places, asked, appended = stood_in
    block_tuning.run(*places)
    whole = CsvSchedule(str(ROOT / peers.SCHEDULE)).rows
    for arm in block_tuning.ARMS:
        rows = CsvSchedule(str(places[1] / f"tuned-{arm}-1/schedule.csv")).rows
        assert sum(row.epochs for row in rows) == sum(row.epochs for row in whole) == 11
        assert len(rows) == (5 if arm.endswith("progressive") else 1)
    steps = {options["--trainer.limit_train_batches"] for command, _, options in asked.values() if command == "fit"}
    assert steps == {str(block_tuning.TOKENS // (peers.BLOCK * peers.BATCH * 11))} and len(asked) == 18
    assert CsvSchedule(str(places[1] / "tuned-dense-1/schedule.csv")).rows[-1].dense == 1
    assert CsvSchedule(str(places[1] / "tuned-tiers-oneshot-1/schedule.csv")).rows[-1].ratios == whole[-1].ratios
    found = {figure["figure"]: (figure["value"], figure["reached"]) for figure in appended}
    assert found["tuned-dense-wiki"] == (1, None) and found["tuned-2:4-books"] == (2, None)
    assert found["progressive-mix-wiki"] == (pytest.approx(0.6), True)
    told = next(figure for figure in appended if figure["figure"] == "tuned-2:4-books")
    assert told["details"]["tuned_tokens"] == 55 * 1024 and "56,320 tokens" in told["what"], "those of its log"
    calibrated = {options["--model.calibration_blocks"] for _, _, options in asked.values()}
    assert calibrated == {str(told["details"]["calibration_tokens"] // peers.BLOCK)} == {"16"}


def test_a_million_tokens_are_held_to_their_limit(stood_in):
    places, asked, appended = stood_in
    block_million.run(*places)
    assert set(asked) == {"million-dense-1", "million-mix-oneshot-1"}
    found = {figure["figure"]: figure for figure in appended}
    judged = found["million-mix-oneshot-books"]
    assert judged["value"] == 2 and judged["reached"] is False and judged["details"]["tuned_tokens"] == 56_320
    assert found["million-dense-books"]["reached"] is None


AUTHORS = """
import torch
def get_loaders(*args, **kwargs): raise RuntimeError("their data")
def prune_wanda(args, model, tokenizer, device, prune_n, prune_m):
    loader, _ = get_loaders("c4")
    hidden = model.model.embed_tokens(loader[0][0])
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=None)
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear): module.weight.view(-1, 4)[:, :2] = 0
    torch.cuda.synchronize()
"""


def test_the_authors_code_runs_on_todays_layers(tmp_path, monkeypatch):
    (tmp_path / "official/lib").mkdir(parents=True)
    (tmp_path / "official/lib/__init__.py").touch()
    (tmp_path / "official/lib/prune.py").write_text(AUTHORS)
    tiny_llama().save_pretrained(tmp_path / "chat")
    monkeypatch.setattr(block_official, "LENGTH", 8)
    text = [torch.arange(8)[None]]
    found = block_official._theirs(tmp_path / "chat", tmp_path / "official", "wanda", text, {"wiki": text})
    assert found["zeros"] == 0.5 and found["wiki"] > 1
    ours = block_official._ours(tmp_path / "chat", block_official.METHODS["wanda"], text, {"wiki": text})
    assert ours["zeros"] == pytest.approx(0.5, abs=0.02)
