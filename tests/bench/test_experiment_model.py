"""Experiments on a model ask for it, others do not take one, and each says where its figures go."""

import importlib
from pathlib import Path

import pytest

from bench import experiments
from bench.__main__ import experiment


def test_an_experiment_says_whether_it_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match="structured_ablation needs --model FOLDER"):
        experiment("structured_ablation", tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="real_model needs --texts NAME=FILE,NAME=FILE"):
        experiment("real_model", tmp_path / "records.jsonl", model=Path("anything"), texts="valid.txt")
    with pytest.raises(ValueError, match="quickstart takes no --model"):
        experiment("quickstart", tmp_path / "records.jsonl", model=Path("anything"))


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_names_its_records(name):
    records = importlib.import_module(f"bench.experiments.{name}").RECORDS
    assert records.endswith(".jsonl") and "/" not in records
