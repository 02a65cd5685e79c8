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
# In one process, since importing takes most of the time: the help of every family, then a sweep's arguments.
ASK = """
import contextlib, io, json, sys
from callbacks.parser import problem
from main import main
said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["main.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    said[name] = out.getvalue()
base = ["check", "--config", "configs/bench/base.yaml", "--trainer.callbacks=null"]
compressor = "--trainer.strategy.compressor"
said["sweep"] = [problem(main, [*base, f"{compressor}={name}"]) for name in ("Plain16", "Plain61")]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The code, with one more file in each family."""
    folder = tmp_path_factory.mktemp("house")
    for part in ("lightning_modules", "strategies", "callbacks", "common", "bench", "configs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("main.py", "setup.cfg", "CONTRIBUTING.md"):
        shutil.copy(ROOT / part, folder)
    for path, text in EXAMPLES.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text, "utf-8")
    return folder


def _run(house, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(house), "CI": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=house, env=environment, capture_output=True, text=True)


def test_there_is_an_example_of_every_family():
    assert NAMES.keys() == HELP.keys()


def test_help_and_sweep_know_each(house):
    done = _run(house, "-c", ASK, json.dumps(HELP))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        unwrapped = re.sub(r"\s", "", said[name])  # help breaks lines inside of long names
        assert re.search(rf"knownsubclasses:[^)]*\.{name}[,)]", unwrapped), said[name]
    known, misspelt = said["sweep"]
    assert known is None
    assert "no Compressor Plain61; did you mean Plain16?" in misspelt


@pytest.mark.timeout(600)
def test_law_tests_run_each(house):
    chosen = " or ".join([*NAMES, "variants"])
    out = _run(house, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", chosen, *LAWS).stdout
    for name in NAMES:
        assert re.search(rf"^PASSED \S*\[.*{name}", out, re.M), out[-3000:]
    failed = re.findall(r"^FAILED (.*)$", out, re.M)
    assert not failed


def test_the_report_shows_a_method_by_its_name(tmp_path):
    record = {**report_records.template(), "compress_method": "plain16", "compress_config": {}, "run_name": "mine"}
    records = report_records.write(tmp_path / "results.jsonl", [record])
    assert main(["report", str(records), "-o", str(tmp_path / "report.html")]) == 0
    assert "plain16" in (tmp_path / "report.html").read_text()
