"""How `python -m bench` answers: at once, in the form that was asked for, and to commands that there are not."""

import subprocess
import sys

import pytest

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
