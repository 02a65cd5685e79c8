"""Old commands say their new name."""

import runpy

import pytest

from bench.__main__ import main as bench
from common import moved
from tests.conftest import ROOT
from tests.test_cli import _parse


@pytest.mark.parametrize(("old", "new"), moved.MODULES.items())
def test_an_old_module_names_the_new_one(old, new):
    with pytest.raises(SystemExit, match=f"python -m {old} is now: python -m {new}$"):
        runpy.run_module(old, run_name="__main__")
    path = ROOT / new.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_an_old_configuration_names_the_new_one(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for old, new in moved.ARGUMENTS.items():
        if old.startswith("configs/"):
            assert not (ROOT / old).exists() and (ROOT / new.split()[0]).is_file()
            code, _, err = _parse(capsys, "fit", "--config", old)
            assert code != 0 and f"{old} is now: {new}" in err


def test_an_old_option_of_the_bench_names_the_new_way(capsys):
    assert bench(["table", "records.jsonl", "--into", "README.md"]) == 1
    assert "--into is now: a comment in the document" in capsys.readouterr().err
