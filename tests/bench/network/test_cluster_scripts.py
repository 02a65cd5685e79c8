"""The cluster scripts on two emulated hosts: torchrun itself, and SLURM with a stand-in for srun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.network import link
from tests.conftest import ROOT

OBSTACLE = link.check()
SCRIPTS = ROOT / "configs/cluster"
# What srun sets for the task of each node; without what the emulator sets for torchrun.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
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


_TOLD = "GLOO=$GLOO_SOCKET_IFNAME SINCE=$PARE_STARTED FROM=$PARE_CKPT_PATH."


def _noted(tmp_path, script, arguments, **environment):
    """Run a script with stand-ins for what it starts; each notes its arguments, and srun ends as if stopped."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "noted").unlink(missing_ok=True)
    for name, last in (
        ("srun", "exit 143"),
        ("scontrol", ""),
        ("python", f'[ "$1" != - ] || exec {sys.executable} "$@"'),
    ):
        text = f"#!/bin/bash\n{last if name == 'python' else ''}\n"
        text += f'echo {name} "$@" {_TOLD} >> {tmp_path}/noted\n{last if name != "python" else ""}\n'
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GLOO", "PARE_RANK"))}
    clean |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment}
    status = subprocess.run(
        [str(SCRIPTS / script), *arguments], env=clean, cwd=tmp_path, capture_output=True
    ).returncode
    return status, (tmp_path / "noted").read_text()


_JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}


@pytest.mark.parametrize(("left_s", "queued"), [(100, True), (5000, False)])
def test_slurm_hands_cpus_on_and_queues_again_when_the_time_is_up(left_s, queued, tmp_path):
    end = str(int(time.time()) + left_s)
    status, noted = _noted(tmp_path, "slurm.sh", ["fit", "--config", "c"], **_JOB, SLURM_JOB_END_TIME=end)
    assert status == 143 and ("scontrol requeue 7" in noted) == queued
    assert "--cpus-per-task=6 --kill-on-bad-exit=1 python main.py fit --config c" in noted and "ckpt_path" not in noted


def test_slurm_goes_on_from_the_last_checkpoint_when_queued_again(tmp_path):
    _, noted = _noted(tmp_path, "slurm.sh", ["fit"], **_JOB, SLURM_RESTART_COUNT="1")
    assert "--ckpt_path auto" in noted


def test_a_restarted_job_knows_when_it_started_and_from_what(tmp_path):
    begun = int(time.time())
    _, first = _noted(tmp_path, "slurm.sh", ["fit", "--ckpt_path", "base.ckpt"], **_JOB)
    _, again = _noted(tmp_path, "slurm.sh", ["fit", "--ckpt_path=base.ckpt"], **_JOB, SLURM_RESTART_COUNT="1")
    since = first.split("SINCE=")[1].split()[0]
    assert begun <= int(since) <= time.time() and f"SINCE={since} FROM=base.ckpt." in again
    (tmp_path / ".slurm-7.started").write_text("1234")
    _, again = _noted(tmp_path, "slurm.sh", ["fit"], **_JOB, SLURM_RESTART_COUNT="1")
    assert "--ckpt_path auto" in again and "SINCE=1234 FROM=." in again
    _, ranks = _noted(tmp_path, "torchrun.sh", ["fit", "--ckpt_path", "base.ckpt"], **_NODES)
    assert int(ranks.split("SINCE=")[-1].split()[0]) >= begun and "FROM=base.ckpt." in ranks


_NODES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "RANKS_PER_NODE": "4"}


def test_torchrun_meets_over_c10d_on_the_network_of_the_first_node_and_restarts(tmp_path):
    _, noted = _noted(tmp_path, "torchrun.sh", ["fit"], **_NODES)
    for part in ("--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:29500", "--max-restarts 3", "--local-addr 127.0.0.1"):
        assert part in noted
    assert "is_host=1" in noted and "GLOO=lo" in noted


@pytest.mark.parametrize(
    ("address", "why"),
    [("no.such.node.invalid", "port 29500: "), ("0.0.0.0", "stands for 0.0.0.0 here, which no other node reaches")],
)
def test_torchrun_says_which_address_leads_nowhere(address, why):
    clean = {name: value for name, value in os.environ.items() if name != "PARE_RANK"}
    nodes = {**clean, **_NODES, "MASTER_ADDR": address}
    done = subprocess.run([str(SCRIPTS / "torchrun.sh"), "fit"], env=nodes, capture_output=True, text=True)
    assert done.returncode == 2 and why in done.stderr
    assert f"no network leads to MASTER_ADDR={address}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("restarts", "resumes"), [("0", False), ("2", True)])
def test_torchruns_ranks_go_on_from_the_last_checkpoint_after_a_restart(restarts, resumes, tmp_path):
    _, noted = _noted(tmp_path, "torchrun.sh", ["fit"], PARE_RANK="1", TORCHELASTIC_RESTART_COUNT=restarts)
    assert noted.startswith("python main.py fit") and ("--ckpt_path auto" in noted) == resumes


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_what_is_missing_is_said(script):
    clean = {name: value for name, value in os.environ.items() if name not in ("NNODES", "SLURM_JOB_ID")}
    done = subprocess.run([str(SCRIPTS / script), "fit"], env=clean, capture_output=True, text=True)
    assert done.returncode and ("number of nodes" in done.stderr or "submit with sbatch" in done.stderr)
