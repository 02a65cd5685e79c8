"""Sweeps with stand-in commands: what is run, skipped, recorded, refused and stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from bench import sweep
from bench.__main__ import main
from bench.network import link
from bench.network.launch import StopRequested
from bench.sweep import execute as sweep_execute
from bench.sweep import progress as sweep_progress
from common.records import record
from tests.common.writers import other_process
from tests.conftest import ROOT
from tests.ranks import FORKED

# In place of main.py fit: notes that it ran, then does what its last argument says.
STAND_IN = """
import json, os, sys, time
with open(os.environ["RAN"], "a") as file: print(sys.argv[-1], file=file)
what = sys.argv[-1].partition("=")[2]
if what == "fail": sys.exit("it went wrong")
if what == "hang": time.sleep(300)
if what != "silent":
    os.mkdir("runs")
    line = dict(kind="run", run_name="own", val_ppl=9.0, machine=json.loads(os.environ["HERE"]), step_time_ms_p50=50.0)
    line |= dict(steps_measured=2, comm_time_ms_total=20.0, bytes_compressed_total=10**6, bytes_parameters_total=10**6)
    open("runs/results.jsonl", "w").write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Write a sweep over the given arguments and run it; returns exit status, records and what was run."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("HERE", json.dumps(sweep.machine.identity()))
    monkeypatch.setattr(sweep_execute, "main_py", lambda *a: [sys.executable, "-c", STAND_IN, *a])
    monkeypatch.setattr(sweep, "problems", lambda runs: [None] * len(runs))
    monkeypatch.setattr(link, "check", lambda: "no links in this test")

    def run(what: list, *arguments: str, **content):
        content = {"name": "t", "base": "configs/bench/base.yaml", "axes": {"what": what}, **content}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        results = tmp_path / "results.jsonl"
        status = main(["sweep", "--config", str(tmp_path / "sweep.yaml"), f"--results={results}", *arguments])
        records = record.read(results)[0] if results.exists() else []
        ran = (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []
        return status, records, ran

    return run


def test_each_run_is_recorded_once_with_what_the_sweep_knows(start):
    status, records, ran = start(["a", "b"])
    assert status == 0 and ran == ["--what=a", "--what=b"]
    assert [r["run_name"] for r in records] == ["a", "b"] and records[0]["sweep"] == "t"
    assert records[0]["axes"] == {"what": "a"} and records[0]["wall_s"] > 0 and records[0]["val_ppl"] == 9.0
    assert records[0]["command"] == "python main.py fit --config configs/bench/base.yaml --what=a"
    assert records[0]["link_rate"] is None and records[0]["step_time_ms_modelled"] is None
    status, records, ran = start(["a", "b", "c"])
    assert status == 0 and ran == ["--what=a", "--what=b", "--what=c"] and len(records) == 3


def test_a_failed_run_is_recorded_not_fatal_and_tried_again(start):
    status, records, ran = start(["fail", "silent", "a"])
    assert status == 1 and [r["kind"] for r in records] == ["failure", "failure", "run"]
    assert records[0]["error"] == "it went wrong" and records[0]["exit_status"] == 1 and records[0]["machine"]
    assert "RunRecord" in records[1]["error"] and records[1]["exit_status"] == 0
    _, records, ran = start(["fail", "silent", "a"])
    assert ran == ["--what=fail", "--what=silent", "--what=a", "--what=fail", "--what=silent"] and len(records) == 5


def test_a_run_that_takes_too_long_is_ended(start):
    status, records, _ = start(["hang"], "--timeout_s=2")
    assert status == 1 and "time limit" in records[0]["error"]


def test_a_link_that_cannot_be_emulated_is_modelled_and_says_so(start, capsys):
    _, (entry,), _ = start(["a"], arguments={"link": "8mbit"})
    assert entry["link_rate"] == "8mbit" and entry["link_emulated"] is False
    assert entry["step_time_ms_modelled"] == pytest.approx(50 - 10 + 1000)  # 1 MB a step at 1 MB/s
    assert "modelled, not emulated: no links in this test" in capsys.readouterr().err


def test_arguments_after_the_dashes_reach_every_run(start):
    _, (entry,), ran = start(["a"], "--", "--last=b")
    assert ran == ["--last=b"] and entry["command"].endswith("--what=a --last=b")


def test_a_dry_run_lists_and_runs_nothing(start, capsys):
    start(["a"])
    capsys.readouterr()
    status, records, ran = start(["a", "b"], "--dry-run")
    out = capsys.readouterr().out
    assert status == 0 and len(records) == 1 and ran == ["--what=a"]
    assert "1 of 2 runs to make" in out and "done" in out and "expected time" in out


def test_only_some(start):
    _, _, ran = start(["a", "b", "c"], "--only", "a,c")
    assert ran == ["--what=a", "--what=c"]


def test_results_of_another_machine_are_not_mixed_silently(start, tmp_path, monkeypatch, capsys):
    there = {**sweep.machine.identity(), "cpu": "Zilog Z80"}
    (tmp_path / "results.jsonl").write_text(json.dumps({"kind": "run", "run_name": "x", "machine": there}) + "\n")
    status, _, ran = start(["a"])
    assert status == 1 and not ran and "Zilog Z80" in capsys.readouterr().err
    status, records, _ = start(["a"], "--allow-other-machine")
    assert status == 0 and len(records) == 2


def test_impossible_runs_are_refused_before_the_first(start, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "problems", lambda runs: [None, "no such thing"])
    status, records, ran = start(["a", "b"])
    assert status == 1 and not records and not ran and "b:\n  no such thing" in capsys.readouterr().err


def test_unknown_keys_of_a_sweep_are_refused(start, capsys):
    with pytest.raises(SystemExit):
        start(["a"], axis={"x": [1]})
    assert "axis" in capsys.readouterr().err


def test_two_sweeps_do_not_write_to_one_file(start, tmp_path, capsys):
    with other_process(tmp_path / "results.runs"):
        assert start(["a"])[0] == 1
    assert "being written by another run" in capsys.readouterr().err


def test_stopping_leaves_no_process_and_no_record(start, tmp_path, monkeypatch):
    ended = []

    def stopped(self, timeout=None):
        if not ended:
            while not (tmp_path / "ran").exists():
                time.sleep(0.01)
            ended.append(self.pid)
            raise StopRequested(signal.SIGTERM)
        return wait(self, timeout)

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", stopped)
    status, records, _ = start(["hang", "a"])
    assert status == 128 + signal.SIGTERM and not records
    with pytest.raises(ProcessLookupError):
        os.killpg(ended[0], 0)


def test_a_run_left_by_a_killed_sweep_is_ended_first(tmp_path):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/output.log").write_text("half")
    (tmp_path / "run/pid").write_text(f"{left.pid} {sweep_execute._started(left.pid)}")
    ended = sweep_execute.execute([sys.executable, "-c", "print('new')"], tmp_path / "run", 60)
    assert left.poll() is not None and ended.last_lines == "new" and ended.exit_status == 0


@pytest.mark.parametrize("note", ["", "12", "999999999 1.0", "half a line"])
def test_a_note_of_a_dead_or_half_noted_run_stops_nothing(note, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/output.log").write_text("half")
    (tmp_path / "run/pid").write_text(note)
    assert sweep_execute.execute([sys.executable, "-c", "print('new')"], tmp_path / "run", 60).last_lines == "new"


def test_time_left_is_judged_by_runs_on_the_same_link():
    records = [
        {"kind": "run", "wall_s": w, "link_rate": r} for w, r in ((1, None), (3, None), (5, None), (100, "1mbit"))
    ]
    run = sweep_progress.Run("x", {}, "", (), 2, "1mbit", None, "k")
    assert sweep_progress.typical(records, run) == 100 and sweep_progress.typical([]) is None
    assert sweep_progress.expected(records, [run, run]) == 200


@pytest.fixture
def forked(monkeypatch):
    """Arguments are checked in a process that is forked from one that has all imports."""
    monkeypatch.setattr(sweep, "get_context", lambda _: FORKED)


def test_impossible_arguments_are_found_without_running(forked):
    base = ["--config", "configs/bench/base.yaml"]
    strategy = "--trainer.strategy"
    fsdp2 = f"{strategy}.class_path=CompressedFSDP2"
    feedback = '{"class_path": "ErrorFeedback", "init_args": {"inner": "SignSGD"}}'
    answers = sweep.problems(
        [
            base,
            [*base, f"{strategy}.parameter_compressor=Int8"],  # not one of FSDP1's
            [*base, fsdp2, f"{strategy}.replicas=2", "--trainer.devices=3"],
            [*base, f"{strategy}.compressor={feedback}"],
            [*base, "--trainer.max_stepz=3"],
        ]
    )
    assert answers[0] is None
    for answer, word in zip(answers[1:], ("parameter_compressor", "replicas=2", "majority", "max_stepz"), strict=True):
        assert word in answer


@pytest.mark.timeout(600)
def test_a_real_sweep(tmp_path, forked):
    results = tmp_path / "smoke.jsonl"
    arguments = ["sweep", "--config", str(ROOT / "configs/bench/smoke.yaml"), f"--results={results}"]
    arguments += ["--only", "100mbit/int8", "--", "--trainer.max_steps=8", "--trainer.val_check_interval=8"]
    assert main(arguments) == 0
    (linked,) = record.read(results)[0]
    record.validate(linked)
    assert linked["compress_method"] == "int8" and linked["world_size"] == 2 and linked["val_ppl"] > 1
    assert linked["link_emulated"] is (link.check() is None) and linked["step_time_ms_modelled"] > 0
