"""How `python -m bench` answers: at once, in the form that was asked for, and to commands that there are not."""

import json
import math
import os
import subprocess
import sys

import pytest

import bench.__main__ as entry
from bench.__main__ import main
from tests.bench import report_records as synthetic
from tests.conftest import ROOT

HEAVY = {"torch", "lightning", "transformers", "scipy", "pandas"}
IMPORTS = """
import sys
from bench.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["repot"], ["compare", "{records}"], ["report", "{records}"]])
def test_what_only_reads_records_imports_neither_torch_nor_lightning(arguments, tmp_path):
    records = synthetic.write(tmp_path / "r.jsonl", [synthetic.template()])
    words = [word.format(records=records) for word in arguments]
    words += ["-o", str(tmp_path / "p.html")] if words[0] == "report" else []
    done = subprocess.run([sys.executable, "-c", IMPORTS, *words], cwd=ROOT, capture_output=True, text=True)
    imported = set(done.stderr.splitlines()[-1].split())
    assert "bench" in imported and not imported & HEAVY, imported & HEAVY


def _one_object(capfd):
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    return json.loads(line), err


@pytest.mark.parametrize("place", [0, 1, 3])
def test_forms_stand_anywhere_on_the_line(place, tmp_path, capfd):
    records = synthetic.write(tmp_path / "r.jsonl", [synthetic.template()])
    words = ["compare", str(records), "--fields=world_size"]
    assert main([*words[:place], "--json", *words[place:]]) == 0
    answer, err = _one_object(capfd)
    assert (answer["command"], answer["status"], answer["error"]) == ("compare", 0, None)
    assert answer["result"]["headers"][0] and answer["result"]["rows"] and "profile_2_ranks" in err
    assert main([*words[:place], "--quiet", *words[place:]]) == 0
    assert capfd.readouterr().out == "" and "PARE_QUIET" not in os.environ


def test_what_a_result_cannot_say_in_json_is_text():
    assert entry._plain({"a": [1, math.nan, (2.5, None)], "b": entry.Path("x")}) == {
        "a": [1, "nan", [2.5, None]],
        "b": "x",
    }


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--json"], 2, "give a command"),
        (["repot", "--json"], 2, "did you mean report?"),
        (["--json", "memory"], 2, "memory.models"),
        (["memory", "--json", "llama-1b", "--rankz", "3"], 2, "--rankz"),
        (["compare", "nowhere.jsonl", "--json"], 1, "nowhere.jsonl"),
        (["table", "x.jsonl", "--into", "README.md", "--json"], 1, "--into is now"),
    ],
)
def test_what_is_refused_is_told_in_json(arguments, status, said, capfd):
    try:
        ended = main(arguments)
    except SystemExit as stop:
        ended = stop.code
    answer, err = _one_object(capfd)
    assert ended == answer["status"] == status and answer["result"] is None
    assert said in answer["error"] and said in err and "usage:" not in err


def test_forms_after_the_dashes_are_another_commands(monkeypatch):
    given = []
    monkeypatch.setattr(entry.links, "run", lambda command, *rest: given.append(command) or 0)
    assert main(["link", "--quiet", "--", "python", "main.py", "fit", "--json", "--help"]) == 0
    assert given == [["python", "main.py", "fit", "--json", "--help"]]


def test_the_overview_is_one_screen_with_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines if line.startswith("  ") and "-" not in line.split()[0]][:-1] == [
        *entry._COMMANDS
    ]
