"""Experiments on a model ask for it, others do not take one, and each says where its figures go."""

import importlib
from pathlib import Path

import pytest

from bench import experiments
from bench.__main__ import experiment
from bench.experiments import prefill_speed, token_answers, token_quality
from bench.tables import figures


def test_an_experiment_says_whether_it_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match="structured_ablation needs --model FOLDER"):
        experiment("structured_ablation", tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="real_model needs --texts NAME=FILE,NAME=FILE"):
        experiment("real_model", tmp_path / "records.jsonl", model=Path("anything"), texts="valid.txt")
    with pytest.raises(ValueError, match="quickstart takes no --model"):
        experiment("quickstart", tmp_path / "records.jsonl", model=Path("anything"))


def test_figures_of_another_model_do_not_replace_those_of_the_records(tmp_path, monkeypatch):
    records, asked = tmp_path / "records.jsonl", []
    for module in (token_answers, token_quality, prefill_speed):
        monkeypatch.setattr(module, "run", _asking(asked))
    fields = {"what": "w", "value": 1.0, "unit": "%", "target": "report", "reached": None}
    for name, model in (("token_answers", "smollm2"), ("token_quality", "given"), ("other", "large")):
        figures.append(records, figure=name, command=f"python -m bench experiment {name} --model FOLDER",
                       details={"model": model}, **fields)  # fmt: skip
    before = records.read_bytes()
    with pytest.raises(ValueError, match=r"has figures of smollm2, .* of mine: give another file \(--records"):
        experiment("token_answers", records, model=tmp_path / "mine", texts="a=b")
    assert records.read_bytes() == before and not asked
    experiment("token_answers", records, model=tmp_path / "smollm2", texts="a=b")
    experiment(
        "token_quality", records, model=tmp_path / "mine"
    )  # its figures say which of its models, not which folder
    experiment("prefill_speed", records, model=tmp_path / "mine", pruner=tmp_path)
    assert asked == ["smollm2", "mine", "mine"]


def _asking(asked):
    def run(records, folder, model, texts=None, pruner=None):
        asked.append(model.name)

    return run


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_names_its_records(name):
    records = importlib.import_module(f"bench.experiments.{name}").RECORDS
    assert records.endswith(".jsonl") and "/" not in records
