"""Sweeps: a matrix of `main.py fit` runs, one after another, whose records end up in one file."""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.experiments.runs import ROOT
from bench.network import link as links
from bench.network.launch import StopRequested, stop_signals_raise
from bench.sweep import cluster as jobs
from bench.sweep import execute as executing
from bench.sweep import plan as planning
from bench.sweep import progress
from bench.sweep.cluster import Launcher
from bench.sweep.plan import Run
from common.locks import lock
from common.progress import duration
from common.records import machine, record
from common.tables import Table

console = Console()


def sweep(
    name: str,
    base: str,
    axes: dict[str, list[str | int | float | bool] | dict[str, dict[str, Any] | None]],
    arguments: dict[str, Any] = {},  # noqa: B006 - never changed; jsonargparse shows it as the default
    include: list[dict[str, str | list[str]]] = [],  # noqa: B006
    exclude: list[dict[str, str | list[str]]] = [],  # noqa: B006
    results: Path | None = None,
    only: str | None = None,
    dry_run: bool = False,
    allow_other_machine: bool = False,
    timeout_s: float = 3600.0,
    launcher: Launcher = "process",
    ranks_per_node: int = 8,
    cluster: dict[str, Any] = {},  # noqa: B006
    command: list[str] = [],  # noqa: B006
) -> int:
    """Run a matrix of `main.py fit` and gather the records.

    `python -m bench sweep --config configs/bench/….yaml`. A run that is in the results already is skipped, so the
    same command continues a sweep that was interrupted. A run that fails leaves a record of kind "failure" and is
    tried again next time. Runs on a link that cannot be emulated here run without it, and their step time on it is
    modelled from the bytes sent (`step_time_ms_modelled`). Arguments after `--` are added to every run. Exits with 1
    when a run failed.

    Args:
        name: Name of the sweep.
        base: Configuration of `main.py fit`, relative to the repository; needs the callback RunRecord.
        axes: The matrix. An axis maps labels to choices (arguments of main.py, without dashes, to values), or is a list
            of values of the argument it is named after. Four choices place a run: world_size (ranks), link (rate
            between hosts, or null), delay (of that link) and ranks_per_host (1 unless given).
        arguments: Arguments of every run.
        include: Only runs that match one of these filters, each a label or a list of labels by axis; `*` stands for
            anything, and a leading `!` means not.
        exclude: Runs that match one of these are left out.
        results: Where the records go; by default runs/bench/NAME.jsonl.
        only: Run only those whose name (labels joined by "/") matches one of these patterns, such as "int8/*,none/*".
        dry_run: List the runs with their commands and how long they will take, and run nothing.
        allow_other_machine: Add to results that another machine made.
        timeout_s: Seconds after which a run is stopped and counts as failed.
        launcher: "process" makes the runs here, one after another; "slurm" submits each as a job of its own (needs
            pip install -e '.[cluster]'), with a task for each rank; "local" starts them all here at once, to try it.
        ranks_per_node: Ranks of a node of a cluster, at most.
        cluster: Parameters of submitit's executor, such as {slurm_partition: gpu, gpus_per_node: 8, cpus_per_task: 8}.
        command: Arguments added to every run as a JSON list; typing them after `--` is the same.
    """
    runs = planning.select(planning.plan(base, axes, arguments, include, exclude, command), only)
    results = results or Path("runs/bench") / f"{name}.jsonl"
    known = _known(results, allow_other_machine or launcher == "slurm")
    finished = {r["sweep_key"]: r for r in known if r.get("kind") == "run" and "sweep_key" in r}
    done, pending = [run for run in runs if run.key in finished], [run for run in runs if run.key not in finished]
    before = [finished[run.key] for run in done]
    linked, obstacle = any(run.link for run in pending), None
    if launcher != "process":
        jobs.check(pending, launcher, ranks_per_node)
        obstacle = f"runs are jobs of {launcher}" if linked else None
    elif linked:
        obstacle = links.check()
    if obstacle:
        print(f"links are modelled, not emulated: {obstacle}", file=sys.stderr)
    if dry_run:
        _list(runs, finished, list(finished.values()), emulated=obstacle is None)
        return 0
    if pending and launcher != "process":
        jobs.refuse_submitted(cluster, launcher)
    _refuse_impossible(pending, emulated=obstacle is None)
    results.parent.mkdir(parents=True, exist_ok=True)
    # two sweeps at once would make the same runs and disturb each other's times
    with stop_signals_raise(), lock(_work(results)):
        try:
            if launcher == "process":
                made = _run_all(name, pending, before, results, timeout_s, emulated=obstacle is None)
            else:
                made = _submit_all(name, pending, before, results, timeout_s, launcher, cluster, ranks_per_node)
        except StopRequested as stop:
            going_on = "; jobs that were submitted go on" if launcher != "process" else ""
            print(f"stopped; the same command continues{going_on}. Records so far: {results}", file=sys.stderr)
            return 128 + stop.number
    failures = [r for r in made if r["kind"] == "failure"]
    console.print(progress.table([progress.row(r) for r in [*before, *made]], f"{name}: {results}"))
    for failure in failures:
        print(f"{failure['run_name']} failed:\n{failure['error']}\n", file=sys.stderr)
    return 1 if failures else 0


def _known(results: Path, allow_other_machine: bool) -> list[dict[str, Any]]:
    """Records that are there already.

    Raises:
        ValueError: One comes from another machine, and that is not allowed.
    """
    if not results.exists():
        return []
    known, broken = record.read(results)
    if broken:
        print(record.passed_over(results, broken), file=sys.stderr)
    here = machine.identity()
    for entry in known if not allow_other_machine else ():
        there = entry.get("machine") or {}
        # a run's threads are a setting, not the machine
        differing = [key for key in there if key != "torch_threads" and there[key] != here.get(key)]
        if differing:
            details = "; ".join(f"{key} {there[key]!r} there, {here.get(key)!r} here" for key in differing)
            raise ValueError(
                f"{results} holds results of another machine ({details}). Give --results another file, or "
                "--allow_other_machine to mix them: times will not be comparable."
            )
    return known


def _refuse_impossible(runs: Sequence[Run], emulated: bool) -> None:
    """Raise ValueError naming every run that `main.py check` refuses; seeds make no difference."""
    distinct: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        arguments = executing.command_of(run, emulated=False)[3:]  # built here, where nothing is emulated
        arguments = [each for each in arguments if not each.startswith("--seed_everything=")]
        if run.link and emulated:
            arguments += run.placed(emulated)
        distinct.setdefault(tuple(arguments), []).append(run.name)
    answers = zip(distinct.values(), problems(list(distinct)), strict=True)
    wrong = [f"{', '.join(names)}:\n  {problem}" for names, problem in answers if problem]
    if wrong:
        raise ValueError("impossible runs, nothing was started:\n" + "\n".join(wrong))


def problems(runs: Sequence[Sequence[str]]) -> list[str | None]:
    """For each argument list of `main.py fit`, what `main.py check` says is wrong with it, or None.

    Takes seconds, then 0.4 s a list, in a process of its own. Callbacks are left out: one may want a network interface
    that exists only on an emulated host.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_check, [list(run) for run in runs]).result() if runs else []


def _check(runs: Sequence[Sequence[str]]) -> list[str | None]:
    from callbacks.parser import problem
    from main import main

    os.chdir(ROOT)
    os.environ["CI"] = "true"
    return [problem(main, ["check", *arguments, "--trainer.callbacks=null"]) for arguments in runs]


def _work(results: Path) -> Path:
    """Where runs work and leave their logs, one folder a run, named after its key."""
    return results.resolve().with_suffix(".runs")


def _run_all(
    name: str,
    pending: Sequence[Run],
    before: Sequence[Mapping[str, Any]],
    results: Path,
    timeout_s: float,
    emulated: bool,
) -> list[dict[str, Any]]:
    made = []
    with progress.SweepProgress(pending, before) as shown:
        for run in pending:
            shown.starts()
            folder, on_link = _work(results) / run.key, emulated and run.link is not None
            ended = executing.execute(executing.command_of(run, on_link), folder, timeout_s)
            made.append(executing.to_record(run, name, on_link, ended, folder))
            record.append(results, made[-1])
            shown.ended(made[-1])
    return made


def _submit_all(
    name: str,
    pending: Sequence[Run],
    before: Sequence[Mapping[str, Any]],
    results: Path,
    timeout_s: float,
    launcher: Launcher,
    cluster: Mapping[str, Any],
    ranks_per_node: int,
) -> list[dict[str, Any]]:
    made = []
    with progress.SweepProgress(pending, before) as shown:
        shown.starts()
        for run, ended, folder in jobs.run_jobs(pending, _work(results), timeout_s, launcher, cluster, ranks_per_node):
            made.append(executing.to_record(run, name, False, ended, folder))
            record.append(results, made[-1])
            shown.ended(made[-1])
    return made


def _list(
    runs: Sequence[Run], finished: Mapping[str, object], records: Sequence[Mapping[str, Any]], emulated: bool
) -> None:
    """Show what would be run, and for how long."""
    rows = []
    for run in runs:
        took = progress.typical(records, run)
        state = "done" if run.key in finished else duration(took)
        rows.append([run.name, state, run.command(emulated and run.link is not None)])
    pending = [run for run in runs if run.key not in finished]
    total = duration(progress.expected(records, pending) if pending else 0)
    console.print(Table(["run", "expected time", "command"], rows))
    print(f"{len(pending)} of {len(runs)} runs to make, expected time {total}")
