"""One new file a family, and nothing else: command line, law tests, sweep and report know it."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from bench.__main__ import main
from tests.bench import report_records
from tests.conftest import ROOT

EXAMPLES = dict(
    re.findall(r"\n`(\S+\.py)`\n\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S)
)
NAMES = {re.search(r"^class (\w+)\(", text, re.M)[1]: path for path, text in EXAMPLES.items()}
HELP = {
    "Plain16": ["fit", "--trainer.strategy.help", "CompressedFSDP2"],
    "Primacy": ["verify", "--model.help", "TokenQuality"],
    "GradientSum": ["predict", "--model.help", "TokenSaliency"],
    "OutputSize": ["prune", "--model.help", "StructuredPruning"],
    "InverseSquare": ["prune", "--model.help", "StructuredPruning"],
    "Rescale": ["prune", "--model.help", "StructuredPruning"],
    "Energy": ["prune", "--model.help", "BlockSparsity"],
    "RowScale": ["prune", "--model.help", "BlockSparsity"],
    "SineSchedule": ["fit", "--model.help", "BlockSparsity"],
    "FirstWord": ["evaluate", "--model.help", "TaskEvaluation"],
}
LAWS = (
    "tests/common/test_variants.py",
    "tests/strategies/test_laws.py",
    "tests/lightning_modules/token_pruning/test_scorers.py",
    "tests/lightning_modules/token_pruning/test_targets.py",
    "tests/lightning_modules/structured_pruning/test_importance.py",
    "tests/lightning_modules/structured_pruning/test_allocation.py",
    "tests/lightning_modules/structured_pruning/test_compensation.py",
    "tests/lightning_modules/block_sparsity/test_scores.py",
    "tests/lightning_modules/block_sparsity/test_updates.py",
    "tests/lightning_modules/block_sparsity/test_schedules.py",
    "tests/lightning_modules/evaluation/test_local.py",
)
# In one process, since importing takes most of the time: the help of every family, a sweep's arguments, the law tests.
ASK = """
import contextlib, io, json, sys, pytest
from callbacks.parser import problem
from main import main
said, tests = {}, sys.argv[2:]
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["main.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    said[name] = out.getvalue()
base = ["check", "--config", "configs/bench/base.yaml", "--trainer.callbacks=null"]
compressor = "--trainer.strategy.compressor"
said["sweep"] = [problem(main, [*base, f"{compressor}={name}"]) for name in ("Plain16", "Plain61")]
print(json.dumps(said), flush=True)
# what is imported already, plugins too, needs no rewriting
quiet = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
sys.exit(pytest.main(["-q", "-rA", *quiet, *tests]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the code says, with one more file in each family: of help and a sweep, and the law tests' output."""
    folder = tmp_path_factory.mktemp("house")
    for part in ("lightning_modules", "strategies", "callbacks", "common", "bench", "configs", "tests"):
        # with what is compiled already, but for what is just being written
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.pyc.*"))
    for part in ("main.py", "setup.cfg", "CONTRIBUTING.md"):
        shutil.copy(ROOT / part, folder)
    for path, text in EXAMPLES.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "CI": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ASK, json.dumps(HELP), "-k", " or ".join([*NAMES, "variants"]), *LAWS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    said, _, tested = done.stdout.partition("\n")
    assert said.startswith("{"), done.stderr
    return json.loads(said), tested


def test_there_is_an_example_of_every_family():
    assert NAMES.keys() == HELP.keys()


@pytest.mark.timeout(600)
def test_help_and_sweep_know_each(told):
    said, _ = told
    for name in NAMES:
        unwrapped = re.sub(r"\s", "", said[name])  # help breaks lines inside of long names
        assert re.search(rf"knownsubclasses:[^)]*\.{name}[,)]", unwrapped), said[name]
    known, misspelt = said["sweep"]
    assert known is None
    assert "no Compressor Plain61; did you mean Plain16?" in misspelt


def test_law_tests_run_each(told):
    _, out = told
    for name in NAMES:
        assert re.search(rf"^PASSED \S*\[.*{name}", out, re.M), out[-3000:]
    failed = re.findall(r"^FAILED (.*)$", out, re.M)
    assert not failed


def test_the_report_shows_a_method_by_its_name(tmp_path):
    record = {**report_records.template(), "compress_method": "plain16", "compress_config": {}, "run_name": "mine"}
    records = report_records.write(tmp_path / "results.jsonl", [record])
    assert main(["report", str(records), "-o", str(tmp_path / "report.html")]) == 0
    assert "plain16" in (tmp_path / "report.html").read_text()
