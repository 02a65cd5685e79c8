"""Habits that are checked, not remembered."""

import re
import subprocess

import pytest

from tests.conftest import ROOT

TRACKED = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
FILES = [ROOT / name for name in TRACKED.stdout.split()]
PYTHON = [path for path in FILES if path.suffix == ".py" and path.is_file()]


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_top_level_code_folders_are_the_agreed_ones():
    folders = {path.relative_to(ROOT).parts[0] for path in PYTHON if path.parent != ROOT}
    assert folders <= {"lightning_modules", "callbacks", "strategies", "bench", "common", "tests"}


def test_the_command_line_stays_a_page():
    assert len((ROOT / "main.py").read_text().splitlines()) < 80


def test_every_configuration_says_what_it_is_for_how_to_run_it_and_what_it_needs():
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert configs
    for path in configs:
        purpose, *rest = path.read_text().splitlines()
        assert re.match(r"# [A-Z]", purpose), path
        header = "\n".join(line for line in rest if line.startswith("#"))
        assert "# run: python " in header and "# needs: " in header, path
        assert str(path.relative_to(ROOT)) in header, f"{path}: the command names another file"
