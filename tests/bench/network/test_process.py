import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bench.network.process import run_measured

ROOT = Path(__file__).parents[3]

# A parent that allocates in a child: only a walk of the tree sees it.
ALLOCATE = """
import os, sys, time
child = os.fork()
if child == 0:
    block = b'x' * ({megabytes} * 10**6)
    time.sleep(0.5)
    os._exit(0)
os.waitpid(child, 0)
"""


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_reports_exit_status_output_and_time(tmp_path):
    log = tmp_path / "log.txt"
    script = "import os, sys; print(os.environ['GREETING'], os.getcwd()); print('bad', file=sys.stderr); sys.exit(3)"
    done = run_measured([sys.executable, "-c", script], env={"GREETING": "hello"}, cwd=tmp_path, log=log)
    assert done.returncode == 3 and not done.timed_out
    assert f"hello {tmp_path}" in done.output and "bad" in done.output
    assert log.read_text() == done.output
    assert done.wall_s > 0
    assert done.command[0] == sys.executable


def test_keeps_only_the_tail_but_logs_everything(tmp_path):
    log = tmp_path / "log.txt"
    done = run_measured([sys.executable, "-c", "print('x' * 50_000 + 'end')"], log=log)
    assert done.output.endswith("end\n") and len(done.output) == 8000
    assert log.stat().st_size == 50_004


def test_peak_memory_covers_the_whole_tree():
    small, large = (run_measured([sys.executable, "-c", ALLOCATE.format(megabytes=n)]) for n in (1, 200))
    assert small.returncode == large.returncode == 0
    assert small.memory_kind in ("pss", "rss")
    # sampled: on a busy machine the last moments may be missed
    assert 170 < large.peak_memory_mb - small.peak_memory_mb < 230


def test_a_timeout_kills_the_whole_tree():
    script = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen(['sleep', '300'], start_new_session=True); "
        "print(child.pid, flush=True); time.sleep(300)"
    )
    done = run_measured([sys.executable, "-c", script], timeout=2)
    assert done.timed_out and done.returncode == -signal.SIGKILL
    assert not _alive(int(done.output))


def test_an_interrupted_measurement_leaves_nothing_running(tmp_path):
    pid_file = tmp_path / "pid"
    inner = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 300"
    outer = f"from bench.network.process import run_measured; run_measured(['sh', '-c', {inner!r}])"
    measuring = subprocess.Popen([sys.executable, "-c", outer], stderr=subprocess.PIPE, cwd=ROOT)
    while not pid_file.exists():
        assert measuring.poll() is None
        time.sleep(0.01)
    measuring.send_signal(signal.SIGINT)
    _, error = measuring.communicate(timeout=60)
    assert b"KeyboardInterrupt" in error
    assert not _alive(int(pid_file.read_text()))


def test_a_command_that_cannot_start_raises():
    with pytest.raises(FileNotFoundError):
        run_measured(["no-such-program-anywhere"])
    assert "memory-sampler" not in {thread.name for thread in threading.enumerate()}


def test_the_environment_is_added_to_not_replaced():
    done = run_measured([sys.executable, "-c", "import os; print(os.environ['PATH'])"], env={"X": "1"})
    assert done.output.strip() == os.environ["PATH"]
