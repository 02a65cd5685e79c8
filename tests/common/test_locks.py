"""One writer at a time."""

import os
import signal
import subprocess
import sys

import pytest

from common.locks import InUseError, lock
from tests.common.writers import other_process, write
from tests.conftest import ROOT


def test_a_second_writer_is_told_of_the_first(tmp_path):
    with other_process(tmp_path / "run") as other:
        message = rf"run is being written by another run \(process {other.pid} on .* --my-run"
        with pytest.raises(InUseError, match=message), lock(tmp_path / "run"):
            pass
        with pytest.raises(InUseError, match=str(other.pid)):
            write(tmp_path / "run", "second")
    with lock(tmp_path / "run"), lock(tmp_path / "run"):  # freed, and this process may take it again
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_lock(tmp_path):
    with other_process(tmp_path / "run") as other:
        other.kill()
        other.wait()
    assert (tmp_path / ".run.lock").exists()
    write(tmp_path / "run", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_lock_is_not_inherited_by_children_that_outlive_the_holder(tmp_path):
    program = (
        "import os, sys, time; from common.locks import lock\n"
        f"with lock({str(tmp_path / 'run')!r}):\n"
        "    child = os.fork()\n"
        "    time.sleep(60) if child == 0 else (print(child, flush=True), time.sleep(60))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(InUseError, match=str(process.pid)), lock(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with lock(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
