"""A run that cannot start ends on every rank, and says why."""

import os
import socket
import subprocess
import sys
import time

import psutil

from tests.conftest import ROOT

RUN = """
import lightning.pytorch as L
from lightning.pytorch.demos.boring_classes import BoringModel
from strategies import CompressedDDP

L.Trainer(accelerator="cpu", devices=2, strategy=CompressedDDP(), max_steps=1, logger=False).fit(BoringModel())
"""


def _of_this_run(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and mark in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_taken_port_ends_all_ranks_with_the_fix(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    with socket.socket() as occupant:
        occupant.bind(("", 0))
        occupant.listen()  # takes connections and says nothing, as a server of another kind does
        port = occupant.getsockname()[1]
        environment = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 1 and f"MASTER_PORT {port} is taken" in done.stderr
        deadline = time.monotonic() + 60
        while (left := _of_this_run(str(script))) and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in left:
            process.kill()
        assert not left
