"""What a measuring program prints is read as it comes, and its failure is told with the command and its last output."""

import pytest

from bench.experiments import runs

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
