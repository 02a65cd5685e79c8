import sys

import pytest

from lightning_modules.data import progress


@pytest.mark.parametrize("terminal, ci, watched", [(True, "", True), (True, "true", False), (False, "", False)])
def test_bars_are_for_people(monkeypatch, terminal, ci, watched):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("CI", ci)
    assert progress.interactive() is watched


def test_one_line_for_logs(monkeypatch, capsys):
    lines = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    monkeypatch.setattr(progress, "interactive", lambda: False)
    with progress.stage("Reading a.json", 3_000_000, "bytes") as done:
        for position in range(0, 3_000_001, 1000):
            done(position)
    with progress.stage("Tokenising", 1200, "documents") as done:
        done(1200)
    assert [line.split(" in ")[0] for line in lines] == ["Reading a.json: 3.0 MB", "Tokenising: 1,200 documents"]
    assert capsys.readouterr() == ("", "")


def test_bar_for_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "interactive", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.stage("Tokenising", 1200, "documents") as done:
        done(600)
    assert "Tokenising" in capsys.readouterr().err


def test_failed_stage_claims_nothing(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    with pytest.raises(RuntimeError), progress.stage("Tokenising", 10):
        raise RuntimeError
    assert lines == []
