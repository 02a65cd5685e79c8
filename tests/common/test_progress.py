import logging
import os
import subprocess
import sys

import pytest

from common import progress
from tests.conftest import ROOT


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "_log", said.append)
    return said


@pytest.mark.parametrize("terminal, ci, watched", [(True, "", True), (True, "true", False), (False, "", False)])
def test_bars_are_for_people(monkeypatch, terminal, ci, watched):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("CI", ci)
    assert progress.interactive() is watched


def test_one_line_for_logs(monkeypatch, capsys, lines):
    monkeypatch.setattr(progress, "interactive", lambda: False)
    with progress.stage("Reading a.json", 3_000_000, "bytes") as done:
        for position in range(0, 3_000_001, 1000):
            done(position)
    with progress.stage("Tokenising", 1200, "documents") as done:
        done(1200)
    assert [line.split(" in ")[0] for line in lines] == ["Reading a.json: 3.0 MB", "Tokenising: 1,200 documents"]
    assert capsys.readouterr() == ("", "")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("start, expected", [
    (0, ["200 of 1,200 documents, 3 min left", "1,000 of 1,200 documents, 15 s left"]),
    (100, ["200 of 1,200 documents, 7 min left", "1,000 of 1,200 documents, 17 s left"]),
])  # fmt: skip
def test_logs_get_the_time_left_every_half_minute(monkeypatch, lines, start, expected):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "interactive", lambda: False)
    with progress.stage("Tokenising", 1200, "documents", start=start) as done:
        for amount, seconds in ((150, 20), (200, 20), (900, 20), (1000, 15), (1200, 5)):
            clock.now += seconds
            done(amount)
    before = ", 100 documents of it before" if start else ""
    assert lines == [
        *(f"Tokenising: {line}" for line in expected),
        f"Tokenising: 1,200 documents in 80.0 s{before}",
    ]


@pytest.mark.parametrize(
    "seconds, text", [(59.6, "60 s"), (90, "2 min"), (3570, "1 h 00 min"), (10_000, "2 h 47 min"), (None, "unknown")]
)
def test_time_left_in_words(seconds, text):
    assert progress.duration(seconds) == text


def test_bar_for_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "interactive", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.stage("Tokenising", 1200, "documents") as done:
        done(600)
    assert "Tokenising" in capsys.readouterr().err


@pytest.mark.parametrize("rank, said", [(None, ["x"]), (0, ["x"]), (1, [])])
def test_only_the_first_rank_speaks(monkeypatch, caplog, rank, said):
    monkeypatch.setattr(progress.rank_zero.rank_zero_only, "rank", rank, raising=False)
    monkeypatch.setattr(progress.rank_zero, "log", logging.getLogger("ranks"))
    with caplog.at_level("INFO", "ranks"):
        progress._log("x")
    assert caplog.messages == said


def test_a_stage_that_stops_early_says_how_far_it_came(lines):
    with progress.stage("Tokenising", 1200, "chunks", start=100) as done:
        done(300)
    assert lines[0].startswith("Tokenising: 300 of 1,200 chunks in ")


def test_failed_stage_claims_nothing(lines):
    with pytest.raises(RuntimeError), progress.stage("Tokenising", 10):
        raise RuntimeError
    assert lines == []


@pytest.mark.parametrize(
    ("loaded", "quiet", "said"), [("", "", True), ("import lightning", "", True), ("", "1", False)]
)
def test_logs_have_it_with_and_without_lightning(loaded, quiet, said):
    program = f"{loaded}\nfrom common.progress import stage\nwith stage('Reading', 3, 'files') as done: done(3)"
    environment = {**os.environ, "PARE_QUIET": quiet}
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not ran.stdout and ("Reading: 3 files in" in ran.stderr) is said
