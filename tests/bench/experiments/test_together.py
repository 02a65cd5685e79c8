"""All together: every model is made of the one before, finished runs are not repeated, each step is told apart."""

import json

import pytest

from bench.experiments import together
from common.records import record

DENSE = {"rung": "dense", "nll": 2.0, "right": 0.8, "file_bytes": 400, "weight_bytes": 400, "kv_bytes": 60}


def _rung(name, **changed):
    fields = {**DENSE, "rung": name, "nll": 2.5, "nll_rise": 0.5, "nll_rise_low": 0.4, "nll_rise_high": 0.6}
    fields |= {"asked": 10, "right": 0.6, "right_low": 0.4, "right_high": 0.8}
    for phase in ("prefill", "decode"):
        fields |= {f"{phase}_speedup": 1.5, f"{phase}_speedup_spread": 0.1, f"{phase}_bound": 1.7, f"{phase}_gain": 1.2}
    return fields | changed


@pytest.fixture
def commands(monkeypatch):
    """What is run, in place of running it."""
    asked = []

    def run(folder, command, config, *arguments, prefix=()):
        asked.append((folder.name, command, config.rpartition("/")[2], arguments))
        ladder = [DENSE, _rung("structure"), _rung("tokens", kv_bytes=20, nll=2.7)]
        record.append(
            folder / "runs/results.jsonl", {"run_name": folder.name, "date": "d", "ladder": {"rungs": ladder}}
        )
        return 1.0

    monkeypatch.setattr("bench.experiments.runs.run_main", run)
    monkeypatch.setattr(together, "load_config", lambda path: type("Config", (), {"num_hidden_layers": 30}))
    return asked


def test_each_step_works_on_the_one_before_and_its_part_is_told(tmp_path, commands):
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    model = tmp_path / "model"
    model.mkdir()
    for _ in range(2):  # the second time nothing is run and no record comes twice
        together.run(tmp_path / "r.jsonl", tmp_path / "work", model, {"one": text})
    work = tmp_path / "work"
    assert [one[:3] for one in commands] == [
        ("structure", "prune", "prune.yaml"),
        ("recovered", "fit", "recover.yaml"),
        ("tiers", "prune", "oneshot.yaml"),
        ("packed-tiers", "export", "export.yaml"),
        ("packed-int8-files", "export", "export.yaml"),
        ("together", "validate", "together.yaml"),
    ]
    reads = [dict(zip(one[3], one[3][1:], strict=False)) for one in commands]
    assert reads[0]["--model.base"] == reads[1]["--model.teacher"] == reads[5]["--model.pretrained"] == str(model)
    assert reads[1]["--model.base"] == reads[0]["--model.output"] == str(work / "structure/model")
    assert reads[2]["--model.pretrained"] == reads[1]["--trainer.callbacks.dirpath"] == str(work / "recovered/model")
    assert reads[3]["--model.pretrained"] == reads[4]["--model.pretrained"] == reads[2]["--model.output"]
    assert json.loads(reads[5]["--trainer.callbacks.models"]) == {
        "structure": str(work / "recovered/model"),
        "tiers": reads[3]["--model.output"],
        "int8 files": reads[4]["--model.output"],
    }
    assert json.loads(reads[5]["--trainer.callbacks.schedule"])["init_args"] == {"layers": [15], "keep": 0.25}
    found = record.read(tmp_path / "r.jsonl")[0]
    assert sum(one["run_name"] == "together" for one in found if "run_name" in one) == 1
    figures = {one["figure"]: one for one in found if one.get("kind") == "figure"}
    assert figures["together-tokens-cache"]["value"] == 3 and figures["together-tokens-prefill"]["value"] == 1.5
    assert "the step itself +0.200" in figures["together-tokens-loss"]["what"]
    assert figures["together-structure-facts"]["value"] == 60
    assert "before the step 80%" in figures["together-structure-facts"]["what"]


def test_another_text_first_is_another_experiment(tmp_path, commands):
    (tmp_path / "model").mkdir()
    texts = {}
    for name in ("one", "two"):
        texts[name] = tmp_path / f"{name}.json"
        texts[name].write_text(json.dumps([{"text": name}] * 2))
    together.run(tmp_path / "r.jsonl", tmp_path / "work", tmp_path / "model", texts)
    with pytest.raises(ValueError, match=r"another state \(arguments\)"):
        together.run(tmp_path / "r.jsonl", tmp_path / "work", tmp_path / "model", dict(reversed(texts.items())))
