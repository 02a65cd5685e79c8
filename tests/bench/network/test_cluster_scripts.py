"""The cluster scripts on two emulated hosts: torchrun itself, and SLURM with a stand-in for srun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.network import link
from tests.conftest import ROOT

OBSTACLE = link.check()
SCRIPTS = ROOT / "configs/cluster"
# What srun sets for the task of each node; without what the emulator sets for torchrun.
SRUN = """#!/usr/bin/env bash
exec env -u TORCHELASTIC_RUN_ID -u LOCAL_RANK -u WORLD_SIZE SLURM_PROCID=$RANK SLURM_NODEID=$RANK SLURM_LOCALID=0 \\
  SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_JOB_NAME=pare "$@"
"""
SMALL = {
    "trainer.max_steps": 3, "trainer.limit_val_batches": 0, "model.config": "{n_layer: 1, n_embd: 32, n_head: 2}",
    "data.sources": "[topics]", "data.vocab_size": 300, "data.block_size": 16, "data.batch_size": 2,
}  # fmt: skip


@pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_two_nodes_train_together(script, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = {"NNODES": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "1234", "CI": "true"}
    config = ROOT / "configs/bench/base.yaml"
    arguments = ["fit", "--config", str(config), *(f"--{name}={value}" for name, value in SMALL.items())]
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "link", "--rate", "1gbit", "--", str(SCRIPTS / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, **nodes, "PATH": path, "PYTHONPATH": str(ROOT), "RANKS_PER_NODE": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = (tmp_path / "runs/results.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["world_size"] == 2 and entry["steps"] == 3
    assert "MEMBER: 2/2" in done.stdout + done.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_what_is_missing_is_said(script):
    clean = {name: value for name, value in os.environ.items() if name not in ("NNODES", "SLURM_JOB_ID")}
    done = subprocess.run([str(SCRIPTS / script), "fit"], env=clean, capture_output=True, text=True)
    assert done.returncode and ("number of nodes" in done.stderr or "submit with sbatch" in done.stderr)
