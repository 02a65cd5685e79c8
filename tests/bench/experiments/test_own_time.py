"""Pare's own times are of the commands that CI runs, and a failure is no time."""

import pytest

from bench.experiments import own_time
from common.records import record
from tests.conftest import ROOT


def test_tests_are_timed_as_ci_runs_them():
    assert " ".join(own_time.PYTEST) in (ROOT / ".ci/run").read_text()


def test_help_and_tests_are_timed_and_counted(tmp_path, monkeypatch):
    (tmp_path / "test_a.py").write_text("import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n")
    monkeypatch.setattr(own_time, "HELP", {"main.py --help": ("main.py", "--help")})
    monkeypatch.setattr(own_time, "REPEATS", 1)
    monkeypatch.setattr(own_time, "PYTEST", ("pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_a.py")))
    own_time.run(tmp_path / "r.jsonl", tmp_path / "work")
    told, tested = record.read(tmp_path / "r.jsonl")[0]
    assert told["figure"] == "help-main.py" and 0 < told["value"] < 60
    assert tested["details"] == {"tests": 2, "skipped": 1} and "1 tests, 1 left out" in tested["what"]
    (tmp_path / "test_a.py").write_text("def test_a(): assert False\n")
    with pytest.raises(RuntimeError, match=r"what it said is in .*tests\.log"):
        own_time.run(tmp_path / "r.jsonl", tmp_path / "work")
    assert len(record.read(tmp_path / "r.jsonl")[0]) == 3
