"""Printing cannot fail what is printed about."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from common.output import steady
from tests.conftest import ROOT

SAY = """
import sys
from pathlib import Path
from rich.console import Console
from rich.table import Table
from common.output import steady
table = Table(title="2 × 3 — Größe")
table.add_row("π")
with steady():
    for _ in range(20000):
        print("ein Maß × 2")
    Console().print(table)
    print("Fehler: Größe", file=sys.stderr)
Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
@pytest.mark.parametrize("redirect", ["> /dev/null", "| head -n 1", ">&- 2>&-", "> /dev/full 2> /dev/full"])
def test_no_terminal_ends_a_program(variables, redirect, tmp_path):
    done, program = tmp_path / "done", tmp_path / "say.py"
    program.write_text(SAY, encoding="utf-8")
    shell = f'"{sys.executable}" "{program}" "{done}" {redirect}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    ended = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and done.read_text() == "done", ended.stderr
    assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr


def test_what_cannot_be_encoded_is_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    table = Table(title="2 × 3")
    table.add_row("π")
    with steady():
        print("5 × 7")
        Console().print(table)
    said = raw.getvalue().decode("ascii")
    assert "5 ? 7" in said and "2 ? 3" in said


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with steady():
        assert sys.stdout is not before[0] and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
