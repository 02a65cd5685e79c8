"""Documents are short, their links lead somewhere, and their commands and imports are accepted as they stand."""

import ast
import importlib
import re
import shlex
import sys
from itertools import pairwise
from textwrap import dedent

import pytest

from bench.__main__ import main as bench
from bench.tables.documents import documents
from common.front import screens
from tests.conftest import ROOT
from tests.test_cli import _parse
from tests.test_repository import FILES, PYTHON

TRACKED = [path.relative_to(ROOT).as_posix() for path in FILES if path.is_file()]
KNOWN = set(re.findall(r"\w+", "\n".join(path.read_text() for path in PYTHON)))
DOCUMENTS = [path for path in documents(ROOT) if path.name != "CHANGELOG.md"]
SMALL = "runs/llama_gqa"  # the model that configurations prune where no other is given
ACCEPTED: set[tuple[str, ...]] = set()  # arguments of main.py that were tried already
FEATURES = [
    path
    for path in DOCUMENTS
    if path.name == "README.md" and path.relative_to(ROOT).parts[0] not in ("README.md", "docs")
]


def _name(path):
    return path.relative_to(ROOT).as_posix()


def _commands(text: str) -> list[str]:
    """Lines of fenced shell blocks, continuation lines joined, and commands in the cells of tables."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [found for row in rows for found in re.findall(r"`(python (?:main\.py|-m bench) [^`]*)`", row)]
    return [line for line in lines if line.strip() and not line.startswith("#")] + cells


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_files_named_in_commands_exist(path):
    for command in _commands(path.read_text()):
        words = shlex.split(command, comments=True)
        for before, word in pairwise(["", *words]):
            written = before == "--records"  # experiments make it
            if (not written and word.startswith(("configs/", "bench/", "strategies/"))) or word == "main.py":
                assert (ROOT / word).exists(), f"{path.name}: {command}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_files_and_classes_named_in_prose_exist(path):
    """Those of Pare: a script of the original or a file that a run leaves has no place in the repository."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    if path.name == "original_scripts.md":  # a table's first column holds the names of others
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    for name in re.findall(r"`([\w/-]+\.(?:py|sh|yaml|md))`", text):
        made = path.name == "CONTRIBUTING.md" and f"`{name}`\n\n```python" in path.read_text()
        assert made or any(f"/{file}".endswith(f"/{name}") for file in TRACKED), f"{path.name}: {name}"
    for name in re.findall(r"`([A-Z][a-z]+\w*[A-Z]\w*)`", text):
        assert name in KNOWN, f"{path.name}: there is no {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_commands_are_accepted_as_they_stand(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in _commands(path.read_text()):
        words = shlex.split(command, comments=True)
        arguments = tuple(words[words.index("main.py") + 1 :]) if "main.py" in words else ()
        if not arguments or arguments in ACCEPTED:  # documents repeat each other's, and each takes half a second
            continue
        if "mine/prune.yaml" in arguments:
            continue  # what `init` writes; tests/test_command_line.py
        if arguments[0] in ("init", "completion"):  # answered without a configuration; tests/test_command_line.py
            assert screens.COMMANDS[arguments[0]].options
            continue
        code, out, err = _parse(capsys, *arguments, "--print_config")
        assert code == 0, f"{command}\n{err}"
        own = any(re.fullmatch("[A-Z]+", word) for word in words)  # FOLDER, and what the original scripts name
        assert not own or SMALL not in out, f"{command}: still reads {SMALL}, which is not there for another model"
        ACCEPTED.add(arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_bench_commands_exist_with_their_options(path, capsys):
    for command in _commands(path.read_text()):
        words = shlex.split(command.split(" -- ")[0], comments=True)
        if words[:3] == ["python", "-m", "bench"]:
            with pytest.raises(SystemExit) as stop:
                sys.exit(bench([words[3], "--help"]))
            told = capsys.readouterr().out
            assert not stop.value.code, command
            options = [
                word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in words if word[:2] == "--"
            ]
            assert all(option in told for option in options), f"{command}: {options}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_imports_of_python_blocks_exist(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        for node in ast.walk(ast.parse(dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module != "your_code":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{node.module}: {block}"


def _anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=_name)
def test_relative_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
        to = path.parent / target if target else path
        assert to.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in _anchors(to.read_text()), f"{path.name}: {target}#{anchor}"


def test_readmes_are_short():
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "README.md", *FEATURES)}
    assert len(lines) >= 7
    long = {_name(path): count for path, count in lines.items() if count > (150 if path.parent == ROOT else 120)}
    assert not long, "README.md has at most 150 lines, a feature's 120: move what is long to docs/"


def test_readme_has_the_two_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert "pip install -c constraints.txt -e . && python main.py fit --config configs/quickstart.yaml" in text
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text
    assert "pip install -q -c constraints.txt -e '.[test]'" in (ROOT / ".ci/run").read_text()
