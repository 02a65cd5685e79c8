"""Commands in the documents name files that exist and are accepted; links lead somewhere."""

import re
import shlex
from itertools import pairwise

import pytest

from tests.conftest import ROOT
from tests.test_cli import _parse

DOCUMENTS = [p for p in (ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")) if p.is_file()]


def _commands(text: str) -> list[str]:
    """Lines of fenced shell blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_named_in_commands_exist(path):
    for command in _commands(path.read_text()):
        words = shlex.split(command, comments=True)
        for before, word in pairwise(["", *words]):
            written = before == "--records"  # experiments make it
            if (not written and word.startswith(("configs/", "bench/", "strategies/"))) or word == "main.py":
                assert (ROOT / word).exists(), f"{path.name}: {command}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_are_accepted_as_they_stand(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in _commands(path.read_text()):
        words = shlex.split(command, comments=True)
        if "main.py" in words:
            code, _, err = _parse(capsys, *words[words.index("main.py") + 1 :], "--print_config")
            assert code == 0, f"{command}\n{err}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_readme_has_the_two_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert "pip install -c constraints.txt -e . && python main.py fit --config configs/quickstart.yaml" in text
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text
    assert "pip install -q -c constraints.txt -e '.[test]'" in (ROOT / ".ci/run").read_text()
