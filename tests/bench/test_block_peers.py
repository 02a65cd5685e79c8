"""Every peer is asked for what its name says, and its model goes once it is measured."""

import json

import pytest

from bench.experiments import block_peers as peers
from lightning_modules.block_sparsity.schedules.csv_file import CsvSchedule
from tests.conftest import ROOT


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """What a whole experiment asked of `main.py` and appended; the runs are stood in for."""
    asked, appended = {}, []

    def once(place, command, config, *arguments):
        place.mkdir(parents=True, exist_ok=True)
        asked[place.parent.name] = (command, config, dict(zip(arguments[::2], arguments[1::2], strict=True)))
        (place.parent / "model").mkdir()
        (place.parent / "model/weights").write_text("half a gigabyte")
        return {"tiers": {"iterations": [{"dense": 0.5}], "sparsity": 0.4}}

    def validated(place, config, *arguments):
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        dense = options["--model.pretrained"].endswith("chat")
        assert dense or (place.parent / "model/weights").exists()
        return 10.0 if dense else 15.0 if "tuned-dense" in str(place) else 30.0

    monkeypatch.setattr(peers, "once", once)
    monkeypatch.setattr(peers, "validated", validated)
    monkeypatch.setattr(peers.figures, "append", lambda records, **figure: appended.append(figure))
    (tmp_path / "chat").mkdir()
    texts = {}
    for name in ("wiki", "books"):
        texts[name] = tmp_path / f"{name}.json"
        texts[name].write_text(json.dumps([{"text": f"{name} {i}"} for i in range(4)]))
    peers.run(tmp_path / "records.jsonl", tmp_path / "work", tmp_path / "chat", texts)
    return asked, appended, tmp_path / "work"


def test_arms_are_asked_for_by_seed_and_their_models_go(ran):
    asked, appended, folder = ran
    assert len(asked) == len(peers.SEEDS) * (len(peers.untrained()) + len(peers.TUNED))
    assert not list(folder.glob("*/model"))
    for name, (command, _, options) in asked.items():
        assert command == ("fit" if name.startswith("tuned") else "prune")
        assert options["--model.calibration_seed"] == options["--seed_everything"] == name[-1]
    _, _, wanda = asked["2:4-wanda-1"]
    assert (wanda["--model.score"], wanda["--model.update"], wanda["--model.pattern"]) == ("Wanda", "null", "2:4")
    _, _, sparsegpt = asked["4:8-sparsegpt-2"]
    assert (sparsegpt["--model.score"], sparsegpt["--model.update"]) == ("ObsSaliency", "Obs")
    _, _, last = asked["tiers-5-magnitude-3"]
    shares = [float(last[f"--model.schedule.{tier}"]) for tier in ("dense", "mid_2_4", "topk")]
    assert shares == [0.35, 0.45, 0.2] and last["--model.pattern"] == "tiers"
    assert asked["tiers-auto-1"][2]["--model.topk"] == "auto"
    ratios = {figure["figure"]: figure["value"] for figure in appended}
    assert ratios["dense-wiki"] == 1 and ratios["2:4-wanda-books"] == 3
    assert ratios["tuned-dense-wiki"] == 1 and ratios["tuned-2:4-books"] == 2
    json.dumps(appended, allow_nan=False)


def test_all_ways_of_tuning_have_as_many_epochs_and_tokens(ran):
    asked, _, folder = ran
    whole = CsvSchedule(str(ROOT / peers.SCHEDULE)).rows
    for arm in peers.TUNED:
        rows = CsvSchedule(str(folder / f"tuned-{arm}-1/schedule.csv")).rows
        assert sum(row.epochs for row in rows) == sum(row.epochs for row in whole) == 11
        assert len(rows) == (5 if arm == "tiers-progressive" else 1)
    steps = {options["--trainer.limit_train_batches"] for command, _, options in asked.values() if command == "fit"}
    assert len(steps) == 1
    assert CsvSchedule(str(folder / "tuned-dense-1/schedule.csv")).rows[-1].dense == 1
    assert CsvSchedule(str(folder / "tuned-tiers-oneshot-1/schedule.csv")).rows[-1].ratios == whole[-1].ratios
