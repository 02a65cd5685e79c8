"""The tour goes on after a kill and around a failure, its commands are accepted, and its table is what records say."""

import json
import multiprocessing
import os
import shlex
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import bench.__main__ as entry
from bench import tour as package
from bench.network.launch import StopRequested
from bench.tour import results, running
from bench.tour.steps import Given, Step, plan
from common.records import record
from tests.conftest import ROOT
from tests.test_cli import _parse

FIRST = Step("first", "x", "main", ("a",), 3)
SECOND = Step("second", "x", "main", ("b",), 3, needs=("first",))
OTHER = Step("other", "x", "main", ("c",), 3)
REPORT = Step("report", "x", "bench", ("d",), 3, always=True)
STEPS = [FIRST, SECOND, OTHER, REPORT]


class Fake:
    """Starts nothing; notes what it was told to start, and ends as it was told to."""

    def __init__(self, **status):
        self.started, self.status = [], status

    def __call__(self, step, folder, log, elapsed):
        self.started.append(step.name)
        log.write_text(f"output of {step.name}\n")
        elapsed()
        if self.status.get(step.name) == "stop":
            raise StopRequested(15)
        return self.status.get(step.name, 0)


def states(ended):
    return [one.state for one in ended]


def test_a_failure_stops_only_what_needs_it_and_is_mended_by_the_same_command(tmp_path, capsys):
    broken, mended, again = Fake(first=3), Fake(), Fake()
    ended = running.run(STEPS, tmp_path, broken)
    assert states(ended) == ["failed", "left out", "done", "done"]
    assert broken.started == ["first", "other", "report"] and running.failed(ended) == ["first"]
    out = capsys.readouterr().out
    assert "FAILED" in out and "exit status 3" in out and "output of first" in out and "left out: needs first" in out
    assert states(running.run(STEPS, tmp_path, mended)) == ["done"] * 4
    assert mended.started == ["first", "second", "report"]  # the report is of more now
    assert states(running.run(STEPS, tmp_path, again)) == ["done"] * 4 and again.started == []


def test_what_was_done_before_is_no_progress_of_today(tmp_path, monkeypatch):
    shown = []

    @contextmanager
    def stage(title, total, unit, start=0):
        shown.append((start, total))
        yield shown.append

    monkeypatch.setattr(running, "stage", stage)
    running.run([FIRST], tmp_path, Fake())
    shown.clear()
    running.run(STEPS, tmp_path, Fake())
    (start, total), *amounts = shown
    assert (start, total) == (3, 12) and amounts == sorted(amounts) and amounts[0] == 3 and amounts[-1] == 12


def test_an_interrupted_step_is_begun_again_and_finished_ones_are_not(tmp_path):
    with pytest.raises(StopRequested):
        running.run(STEPS, tmp_path, Fake(second="stop"))
    after = Fake()
    running.run(STEPS, tmp_path, after)
    assert after.started == ["second", "other", "report"]
    other = Fake()  # another command of the same name is another step
    running.run([Step("first", "x", "main", ("z",), 3), REPORT], tmp_path, other)
    assert other.started == ["first", "report"]


def test_what_cannot_run_here_says_why_and_is_no_failure(tmp_path):
    fake = Fake()
    ended = running.run([Step("first", "x", "main", ("a",), 3, obstacle="needs a moon"), SECOND, OTHER], tmp_path, fake)
    assert states(ended) == ["left out", "left out", "done"] and ended[0].why == "needs a moon"
    assert running.failed(ended) == [] and fake.started == ["other"]


@pytest.fixture
def forked(monkeypatch):
    """Steps are forked from this process, which has all imports."""
    monkeypatch.setattr(running, "_warm", lambda: multiprocessing.get_context("fork"))


def test_a_step_is_the_command_itself_in_the_tours_folder(tmp_path, forked):
    record.append(tmp_path / "r.jsonl", {"run_name": "mine", "config": "seed: 1\n"})
    log = tmp_path / "log"
    step = Step("x", "x", "bench", ("configuration", "r.jsonl", "mine"), 1)
    assert running.in_own_process(step, tmp_path, log, lambda: None) == 0 and log.read_text() == "seed: 1\n"
    wrong = Step("x", "x", "bench", ("configuration", "r.jsonl", "other"), 1)
    assert running.in_own_process(wrong, tmp_path, log, lambda: None) == 1 and "error: " in log.read_text()


@pytest.fixture
def waiting(tmp_path, forked, monkeypatch):
    """A step that would take ten minutes, and its process once it runs."""

    def waits(arguments):
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    def number():
        return int((tmp_path / "pid").read_text() or 0) if (tmp_path / "pid").exists() else 0

    monkeypatch.setattr(entry, "main", waits)
    return Step("x", "x", "bench", (), 1), number


def test_nothing_of_a_stopped_step_is_left(tmp_path, waiting):
    step, number = waiting

    def stop():
        if number():
            raise StopRequested(15)

    with pytest.raises(StopRequested):
        running.in_own_process(step, tmp_path, tmp_path / "log", stop)
    assert not psutil.pid_exists(number())


def test_a_step_ends_when_the_tour_is_killed(tmp_path, waiting):
    step, number = waiting
    arguments = (step, tmp_path, tmp_path / "log", lambda: None)
    tour = multiprocessing.get_context("fork").Process(target=running.in_own_process, args=arguments)
    tour.start()
    while not number():
        time.sleep(0.05)
    tour.kill()
    tour.join()
    while psutil.pid_exists(number()):  # or the test's own limit
        time.sleep(0.05)


def test_steps_start_with_what_takes_long_to_import():
    found = "import sys; sys.exit(not {'torch', 'lightning', 'transformers', 'matplotlib'} <= sys.modules.keys())"
    process = running._warm().Process(target=exec, args=(found,))  # a function of this module would import them
    process.start()
    process.join()
    assert process.exitcode == 0


def test_steps_need_only_what_comes_before(tmp_path):
    for given in (None, Given("org/model", 30), Given("/m.gguf", 30, Path("/t"), Path("/v"))):
        for short in (False, True):
            steps = plan(tmp_path, given, short)
            names = [step.name for step in steps]
            assert len(set(names)) == len(names)
            for number, step in enumerate(steps):
                assert set(step.needs) <= set(names[:number])
    assert sum(step.seconds for step in plan(tmp_path, None, short=True)) <= 120


def test_commands_for_a_given_model_are_accepted(tmp_path, capsys, monkeypatch):
    """Those for the tour's own models run in CI."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.json"
    text.write_text('[{"text": "x"}]')
    whole = {step.name: step for step in plan(tmp_path, Given("org/model", 30), short=False)}
    for step in [
        *plan(tmp_path, Given("org/model", 30, text, text), short=True),
        whole["answers"],
        whole["evaluation"],
    ]:
        words = shlex.split(step.command(tmp_path))
        if words[1].endswith("main.py"):
            assert (tmp_path / words[1]).resolve() == ROOT / "main.py" and (tmp_path / words[4]).is_file()
            code, out, err = _parse(capsys, *words[2:], "--print_config")
            assert code == 0, f"{step.name}: {err}"
            assert "llama_gqa" not in out, f"{step.name} reads a model that is not there"


def test_arguments_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--train", "a"], ["--val", "a", "--model", "m"], ["--train", "a", "--val", "b"]):
        assert entry.main(["tour", *arguments]) == 1
        assert "go together" in capsys.readouterr().err
    assert entry.main(["tour", "--model", "./nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_command_ends_with_the_table_and_fails_where_a_step_did(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "plan", lambda *_: STEPS)
    monkeypatch.setattr(running, "in_own_process", Fake(other=1))
    assert entry.main(["tour", "--short"]) == 1
    said = capsys.readouterr()
    assert "method" in said.out and "other failed: exit status 1" in said.err
    assert (tmp_path / "runs/tour-short/table.md").read_text().startswith("| method | quality |")
    monkeypatch.setattr(running, "in_own_process", Fake())
    assert entry.main(["tour", "--short"]) == 0
    assert entry.main(["tour", "--folder", "runs/tour-short"]) == 1  # that folder is of the short form
    assert "another state" in capsys.readouterr().err


def test_a_stop_says_what_is_done_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "plan", lambda *_: STEPS)
    monkeypatch.setattr(running, "in_own_process", Fake(second="stop"))
    assert entry.main(["tour", "--short", "--folder", "my tour"]) == 128 + 15
    said = capsys.readouterr().err
    again = "python -m bench tour --folder 'my tour' --short"
    assert f"stopped; 1 of 4 steps are done, and stay so. To go on: {again}\n" in said
    after = Fake()
    monkeypatch.setattr(running, "in_own_process", after)
    assert entry.main(shlex.split(again)[3:]) == 0 and after.started == ["second", "other", "report"]


@pytest.mark.parametrize("where", ["_found", "claim", "lock"])
def test_a_stop_before_the_first_step_is_no_traceback(where, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise StopRequested(2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, where, stop)
    assert entry.main(["tour", "--model", "org/model"] if where == "_found" else ["tour"]) == 128 + 2
    assert "stopped; 0 of " in capsys.readouterr().err


def test_what_the_table_compares_is_measured_on_one_text(tmp_path):
    for given in (None, Given("org/model", 30)):
        compared = [
            step for step in plan(tmp_path, given, short=False) if step.name in ("structure", "recovery", "tiers")
        ]
        sizes = [words[words.index("--data.max_val_blocks") + 1] for step in compared if (words := step.arguments)]
        assert len(compared) == 3 and set(sizes) == {"24" if given else "64"}


def test_the_table_is_read_off_the_records(tmp_path):
    wire = {"steps_measured": 1, "comm_time_ms_total": 80.0, "compress_time_ms": 0.0, "decompress_time_ms": 0.0}
    for method, step, sent, ppl in (("none", 100.0, 1000, 50.0), ("int8", 40.0, 250, 51.0)):
        run = {"axes": {"method": method}, "link_rate": "50mbit", "link_emulated": True, "step_time_ms_p50": step}
        run |= {"step_time_ms_p90": step, "bytes_compressed_total": sent, "bytes_parameters_total": 0, "val_ppl": ppl}
        record.append(tmp_path / "a.jsonl", {"kind": "run", "run_name": method, **run, **wire})
    sizes = {"parameters_before": 100, "parameters_after": 80, "ppl_before": 10.0, "ppl_after": 14.0}
    quality = [
        {"scorer": "unpruned", "keep": None, "accuracy": 0.9, "kept": 1.0},
        {"scorer": "mlp", "keep": 0.3, "accuracy": 0.88, "kept": 0.3},
        {"scorer": "random", "keep": 0.3, "accuracy": 0.4, "kept": 0.3},
    ]
    arms = [{"arm": "pruned", "length": 512, "speedup": 1.5, "bound": 1.9}]
    timed = [{"phase": "prefill", "batch": 1, "speedup": 1.1, "flop_bound": 1.2, "byte_bound": 1.3}]
    rung = {"nll_rise": 0.0, "file_bytes": 400, "kv_bytes": 100, "parameters": 100}
    last = {"rung": "tokens", "nll_rise": 0.5, "file_bytes": 100, "kv_bytes": 50, "right": 0.5}
    last |= {"prefill_speedup": 2.0, "prefill_bound": 2.5, "decode_speedup": 1.0, "decode_bound": 1.6}
    blocks = [
        {"run_name": "recall_quality", "token_quality": quality},
        {"run_name": "recall_prefill", "prefill": {"arms": arms}},
        {"run_name": "prune", "structure": sizes},
        {"run_name": "recover", "val_ppl": 11.0, "date": "2026-01-02"},
        {"run_name": "recover", "val_ppl": 19.0, "date": "2026-01-01"},
        {"run_name": "validated", "inference": {"rows": timed}},
        {"run_name": "tiers", "val_ppl": 12.1, "tiers": {"iterations": [{}], "sparsity": 0.2}},
        {"run_name": "packed", "tiers": {"packed_bytes": 10, "packed_ratio": 1.4, "iterations": []}},
        {"run_name": "packed", "tiers": {"packed_bytes": 5, "packed_ratio": 2.8}, "config": "  export_dtype: int8\n"},
        {"run_name": "together", "ladder": {"rungs": [{"rung": "dense", "right": 1.0, **rung}, last]}},
    ]
    for one in blocks:
        record.append(tmp_path / "b.jsonl", {"kind": "run", **one})
    rows = [" | ".join(map(str, row)) for row in results.table(tmp_path).rows]
    assert rows == [
        "int8 gradients and parameters, 50mbit | perplexity 51 (before 50, +2.0 %) | 4.0 × fewer bytes sent | "
        "step 2.50 × | 5.00 ×",
        "token pruning, trained scorer | 88.0 % of answers right (90.0 % unpruned, 40.0 % by chance) | 30.0 % of the "
        "tokens kept | prefill of 512 tokens 1.50 × | 1.90 ×",
        "structured pruning, cut and refitted | perplexity 14 (before 10, +40.0 %) | 20.0 % fewer parameters | None | "
        "None",
        "structured pruning, recovered | perplexity 11 (before 10, +10.0 %) | 20.0 % fewer parameters | prefill 1.10 × "
        "| 1.30 ×",
        "block sparsity, on the recovered model | perplexity 12.1 (before 11, +10.0 %) | 20.0 % of the weights are zero"
        "; files 1.40 × smaller than 16 bits | None | None",
        "together, tokens | loss +0.500 nats, 50.0 % of facts (100.0 %) | files 8.0 bits a weight of dense (32.0), "
        "cache 2.00 × smaller | prefill 2.00 ×, decode 1.00 × | 2.50 ×, 1.60 ×",
    ]
    asked = [{"scorer": "calibrated", "keep": [0.3], "kept_right": 0.9, "whole_right": 20, "kv_share": 0.5}]
    tried = [{"scorer": "random", "kept": 0.1}]
    record.append(tmp_path / "c.jsonl", {"run_name": "c", "calibration": {"tried": tried}, "token_quality": asked})
    row = next(row for row in results.table(tmp_path).rows if "calibrated" in row[0])
    assert row[1:3] == ["90.0 % of 20 right answers stay, by chance 10.0 %", "cache 50.0 % of the unpruned"]
    assert results.table(tmp_path / "nothing").rows == []
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])  # nothing was written there
