"""Processes that end together, and a temporary folder that workers can use."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from common.processes import check_temporary_folder
from tests.conftest import ROOT

CHILD = """
import os, sys, time
from common.processes import end_with
print(os.getpid(), flush=True)
end_with(int(sys.argv[1]), "rank 1", grace_s=0.1, poll_s=0.05)
time.sleep(600)
"""
PARENT = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]).wait()"


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        open(tmp_path / "errors", "w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as parent,
    ):
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        try:
            child.wait(timeout=60)
        finally:
            if child.is_running():
                child.kill()
    assert "rank 1: ends, because the process that started it has ended" in (tmp_path / "errors").read_text()


def test_a_temporary_folder_too_long_for_sockets_is_refused(monkeypatch):
    for length, fits in ((75, True), (76, False)):
        monkeypatch.setattr(tempfile, "tempdir", "/" + (length - 1) * "x")
        if fits:
            check_temporary_folder()
        else:
            with pytest.raises(ValueError, match=r"TMPDIR: /xx.*has 76 bytes.*TMPDIR=/tmp"):
                check_temporary_folder()


def test_the_limit_is_what_multiprocessing_needs():
    from multiprocessing import connection, util

    folder = Path(util.get_temp_dir())
    name = Path(connection.arbitrary_address("AF_UNIX")).name
    assert len(f"/{folder.name}/{name}") <= 107 - 75
