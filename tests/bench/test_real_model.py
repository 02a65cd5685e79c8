"""Calibration text is not evaluated on, and what is finished is not run again."""

import json
import math

import pytest

from bench.experiments import runs


def test_texts_are_cut_in_two(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"a{i}"} for i in range(5)]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"b{i}"}) + "\n" for i in range(2)))
    second = runs.halves(tmp_path, {"asked": tmp_path / "a.json", "calibration": tmp_path / "b.jsonl"})
    read = {name: [line["text"] for line in json.loads(path.read_text())] for name, path in second.items()}
    first = [line["text"] for line in json.loads((tmp_path / "calibration.json").read_text())]
    assert first == ["a0", "a1", "b0"] and read == {"asked": ["a2", "a3", "a4"], "calibration": ["b1"]}
    assert not (tmp_path / "asked.json").exists(), "what a folder is of: see runs.claim"
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b"}))
    with pytest.raises(ValueError, match=r"b\.jsonl: too short"):
        runs.halves(tmp_path, {"two": tmp_path / "b.jsonl"})


def test_a_validation_is_read_or_run_once(tmp_path, monkeypatch):
    asked = []

    def run(folder, *command):
        asked.append(command)
        folder.mkdir(parents=True)
        (folder / "output.log").write_text("│   val/loss  │  3.5 │\n│   val/ppl   │  33.115451 │\n")
        return 1.0

    monkeypatch.setattr(runs, "run_main", run)
    for _ in range(2):
        assert runs.validated(tmp_path / "dense/one", "a.yaml", "--x", "1") == 33.115451
    assert asked == [("validate", "a.yaml", "--x", "1")]
    (tmp_path / "dense/one/output.log").write_text("│   val/ppl   │  inf │\n")
    assert runs.validated(tmp_path / "dense/one", "a.yaml") == math.inf
    (tmp_path / "dense/one/output.log").write_text("")
    monkeypatch.setattr(runs, "run_main", lambda *given: 1.0)
    with pytest.raises(RuntimeError, match=r"output\.log: the validation says no val/ppl"):
        runs.validated(tmp_path / "dense/one", "a.yaml")
