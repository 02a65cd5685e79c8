"""What a measuring program prints is read as it comes, and its failure is told with the command and its last output.

What is finished is taken again only where it is of the same code, inputs and arguments.
"""

import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.experiments import local_steps, loss_agreement, method_quality, runs, slow_links, token_quality, two_levels
from common.records import record

PROGRAM = """
import json, sys, time
print("hello")
print("a warning", file=sys.stderr)
print(json.dumps({"root": __file__, "arguments": sys.argv[1:]}), flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
if sys.argv[1] == "fail":
    raise SystemExit("no room on the moon")
print(json.dumps({"last": True}))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "measuring.py").write_text(PROGRAM)
    return "measuring"


def test_json_lines_yields_objects_and_keeps_the_rest_in_a_log(program, tmp_path):
    log = tmp_path / "made/program.log"
    first, last = runs.json_lines(program, "go", "2", log=log)
    assert first["arguments"] == ["go", "2"] and first["root"].startswith(str(tmp_path)) and last == {"last": True}
    assert sorted(log.read_text().split("\n")) == ["", "a warning", "hello"]


def test_json_lines_names_the_command_and_shows_the_end_of_the_log(program, tmp_path):
    lines = runs.json_lines(program, "fail", log=tmp_path / "log")
    assert next(lines)["arguments"] == ["fail"]  # lines before the failure are not lost
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1 of \S+ -m measuring fail.*no room on the moon"):
        next(lines)


def test_json_lines_stops_the_program_with_its_reader(program, tmp_path):
    lines = runs.json_lines(program, "wait", log=tmp_path / "log")
    next(lines)  # it comes although the program goes on for ten minutes
    lines.close()  # returns once the program has ended


def test_a_sweep_of_a_link_that_is_not_there_is_no_measurement(tmp_path, monkeypatch):
    made = {"kind": "run", "run_name": "a", "link_emulated": False}

    def make(command, **_):
        results = Path(command[command.index("--results") + 1])
        record.append(results, made)

    monkeypatch.setattr(runs.subprocess, "run", make)
    monkeypatch.setattr(runs.link, "check", lambda: "no root")
    with pytest.raises(ValueError, match=r"sweep two_levels measures steps on a link, .*: no root"):
        runs.sweep("two_levels", tmp_path)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(runs.link, "check", lambda: None)
    with pytest.raises(ValueError, match=r"runs whose link was not there \(a\): give another --folder"):
        runs.sweep("two_levels", tmp_path)
    made["link_emulated"] = None
    monkeypatch.setattr(runs.link, "check", lambda: "no root")
    assert [one["run_name"] for one in runs.sweep("quality", tmp_path)] == ["a"]


@pytest.mark.parametrize("module", [slow_links, local_steps, two_levels, method_quality, token_quality])
def test_experiments_that_go_on_where_they_stopped_claim_their_folder(module, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.touch()
    monkeypatch.setattr(method_quality, "books_beside", list)
    monkeypatch.setattr(token_quality, "corpus", list)
    monkeypatch.setattr(token_quality, "FOREIGN", text)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "quality.jsonl").touch()  # of nobody knows which commit
    with pytest.raises(ValueError, match="nothing says what its runs are of"):
        module.run(tmp_path / "records.jsonl", folder, *([tmp_path] if module is token_quality else []))


@pytest.mark.parametrize("wrong", [0, 1, 49])
def test_losses_agree_only_where_all_are_numbers(wrong, tmp_path, monkeypatch):
    def fit(folder, *_):
        losses = dict.fromkeys(range(loss_agreement.STEPS), 3.0)
        return runs.Run({}, losses | ({wrong: math.nan} if folder.name == "none" else {}), 1.0)

    monkeypatch.setattr(loss_agreement, "fit", fit)
    loss_agreement.run(tmp_path / "records.jsonl", tmp_path)
    none, exchange = record.read(tmp_path / "records.jsonl")[0]
    assert math.isnan(none["value"]) and none["reached"] is False
    assert exchange["value"] == 0.0 and exchange["reached"] is True


def test_runs_that_were_made_again_stand_among_the_records(tmp_path, monkeypatch):
    records = tmp_path / "records.jsonl"
    monkeypatch.setattr(slow_links.bounds, "annotate", list)
    first, again = ({"sweep_key": "k", "date": f"2026-01-0{day}"} for day in (1, 2))
    for found in ([first], [first], [again]):
        slow_links._kept(found, records)
    assert record.read(records)[0] == [first, again]


def test_a_run_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    starts = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "
    for code, error in (("import time; time.sleep(600)", TimeoutError), ("sys.exit('lost')", RuntimeError)):
        monkeypatch.setattr(runs, "main_py", lambda *words, code=code: [sys.executable, "-c", starts + code])
        with pytest.raises(error) as raised:
            runs.run_main(tmp_path, "fit", "any.yaml", timeout_s=3.0)
        said = str(raised.value).splitlines()
        started = psutil.Process(int(said[-1] if error is TimeoutError else said[-2]))
        if error is TimeoutError:
            assert said[0] == "not done in 3 s:"
            assert not started.is_running() or started.status() == psutil.STATUS_ZOMBIE
        else:
            assert said[-1] == "lost"
            started.kill()


def test_a_folder_belongs_to_one_state_of_code_inputs_and_arguments(tmp_path, monkeypatch):
    folder, model = tmp_path / "work", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    state = {"git_commit": "abc"}
    monkeypatch.setattr(runs.machine, "git_state", lambda: state)
    assert runs.claim(folder, model, seeds=(1, 2)) == "abc"
    (folder / "result").touch()
    assert runs.claim(folder, model, seeds=(1, 2)) == "abc"  # finished runs are there to be taken
    with pytest.raises(ValueError, match=r"another state \(arguments\): give another --folder"):
        runs.claim(folder, model, seeds=(1, 3))
    (model / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"another state \(inputs\)"):
        runs.claim(folder, model, seeds=(1, 2))
    (model / "config.json").write_text("{}")
    state["git_commit"] = "abd"
    with pytest.raises(ValueError, match=r"another state \(commit\)"):
        runs.claim(folder, model, seeds=(1, 2))
    (folder / "asked.json").unlink()
    with pytest.raises(ValueError, match="nothing says what its runs are of"):
        runs.claim(folder, model, seeds=(1, 2))


def test_code_that_is_not_committed_is_another_state(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("1\n")
    for command in (
        ["init", "-q"],
        ["add", "code.py"],
        ["-c", "user.name=a", "-c", "user.email=a@a", "commit", "-qm", "1"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    runs.claim(tmp_path / "work")
    (tmp_path / "code.py").write_text("2\n")
    with pytest.raises(ValueError, match=r"another state \(uncommitted changes\)"):
        runs.claim(tmp_path / "work")
