"""A sweep's runs as jobs of a cluster, through submitit: SLURM, or its local stand-in that starts them all here.

The process that submits waits for the jobs and writes the records, like one that runs them itself. When it is stopped,
jobs go on; the same command finds them again by the number that it has noted, and submits only what is left.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from bench.experiments.runs import ROOT
from bench.sweep import execute as executing
from bench.sweep.execute import Ended
from bench.sweep.plan import Run
from common.files import write_text

Launcher = Literal["process", "slurm", "local"]
_POLL_S = 1.0
_OF_A_RUN = ("name", "nodes", "tasks_per_node", "timeout_min")  # parameters of submitit's executor


def check(runs: Sequence[Run], launcher: Launcher, ranks_per_node: int) -> None:
    """Refuse runs that a cluster cannot place.

    Raises:
        ValueError: submitit is not there, a run does not say how many ranks it has, or they fill no nodes.
    """
    _executors()
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node must be at least 1, got {ranks_per_node}")
    for run in runs:
        if launcher == "slurm" and run.world_size is None:
            raise ValueError(f"{run.name}: SLURM starts as many tasks as there are ranks: give world_size")
        if run.world_size is not None and run.world_size % min(run.world_size, ranks_per_node):
            raise ValueError(f"{run.name}: world_size {run.world_size} does not fill nodes of {ranks_per_node} ranks")


def refuse_submitted(options: Mapping[str, Any], launcher: Launcher) -> None:
    """Refuse what submitit would refuse of every run, or in the middle of submitting them.

    Raises:
        ValueError: There is no such cluster here, or a parameter is unknown, of the wrong type, or a run's to say.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            executor = _executors()(folder=folder, cluster=launcher)
        except RuntimeError as error:
            raise ValueError(f"launcher={launcher}: {error}") from error
        for name, value in options.items():
            if name in _OF_A_RUN:
                raise ValueError(f"cluster.{name}: the sweep says this of each run itself; leave it out")
            try:
                executor.update_parameters(**{name: value})
            except (NameError, AssertionError, TypeError, ValueError) as error:
                problem = str(error).partition("\n")[0] or type(error).__name__
                raise ValueError(f"cluster.{name}={value!r}: {problem}") from error


def run_jobs(
    runs: Sequence[Run],
    work: Path,
    timeout_s: float,
    launcher: Launcher,
    options: Mapping[str, Any],
    ranks_per_node: int,
) -> Iterator[tuple[Run, Ended, Path]]:
    """Submit runs that are not submitted yet, and yield all as they end, each with its working folder.

    Args:
        runs: What is left of a sweep.
        work: Where runs work, and submitit keeps its files.
        timeout_s: Seconds after which a run is stopped.
        launcher: See ``Launcher``.
        options: Parameters of submitit's executor, such as slurm_partition or gpus_per_node.
        ranks_per_node: Ranks of a node, at most.
    """
    folder, notes = work / "submitit", work / "jobs.json"
    work.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    numbers: dict[str, str] = json.loads(notes.read_text()) if notes.is_file() else {}
    jobs: dict[str, Any] = {}
    for run in runs:
        nodes, tasks = shape(run, launcher, ranks_per_node)
        executor = _executors()(folder=folder, cluster=launcher)
        minutes = int(timeout_s // 60) + 5  # a run that takes too long ends itself, and says so
        executor.update_parameters(
            name=f"pare {run.name}"[:100], nodes=nodes, tasks_per_node=tasks, timeout_min=minutes, **options
        )
        if run.key in numbers:
            jobs[run.key] = executor._executor.job_class(folder, numbers[run.key], list(range(nodes * tasks)))
            continue
        node_size = ranks_per_node if launcher == "slurm" else None
        command = executing.command_of(run, emulated=False, node_size=node_size)
        jobs[run.key] = executor.submit(work_off, command, work / run.key, timeout_s)
        numbers[run.key] = jobs[run.key].job_id
        write_text(notes, json.dumps(numbers))
    waiting = {run.key: run for run in runs}
    while waiting:
        for key in [key for key in waiting if _through(jobs[key], launcher)]:
            ended = _ended(jobs[key])
            yield waiting.pop(key), ended, work / key
            del numbers[key]  # only now: who reads this has recorded it
            write_text(notes, json.dumps(numbers))
        if waiting:
            time.sleep(_POLL_S)


def shape(run: Run, launcher: Launcher, ranks_per_node: int) -> tuple[int, int]:
    """Nodes, and tasks on each. SLURM starts a task for every rank; the local stand-in one, which starts the others."""
    if launcher == "local" or run.world_size is None:
        return 1, 1
    tasks = min(run.world_size, ranks_per_node)
    return run.world_size // tasks, tasks


def work_off(command: Sequence[str], folder: Path, timeout_s: float) -> Ended:
    """What a task of a job does: one rank of the run; the first one in the run's own folder."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    return executing.execute(command, folder if rank == 0 else folder.with_name(f"{folder.name}.rank{rank}"), timeout_s)


def _through(job: Any, launcher: Launcher) -> bool:
    """Whether a job has ended. One of the local stand-in that was found again is no child of this process."""
    if launcher == "slurm":
        return bool(job.done())
    try:
        alive = psutil.Process(int(job.job_id)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        alive = False
    return job.paths.result_pickle.exists() or not alive


def _ended(job: Any) -> Ended:
    try:
        ended: Ended = job.results()[0]
    except Exception as error:  # whatever has become of the job is the record's to say
        return Ended(1, False, 0.0, f"job {job.job_id} failed: {error}")
    return ended


def _executors() -> Any:
    try:
        from submitit import AutoExecutor
    except ImportError as error:
        raise ValueError("--launcher needs submitit: pip install -e '.[cluster]'") from error
    return AutoExecutor
