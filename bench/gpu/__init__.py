"""Acceptance of a machine with GPUs: every check in a process of its own, results in one file that can be sent back.

`python -m bench gpu` takes at most 12 minutes on one GPU and needs no network. A check is a file of `bench/gpu/checks`;
one that fails, hangs or is killed leaves a record that says so, and stops nothing else. A run that was killed itself
goes on with the check that it was at.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.gpu import checks
from bench.network.launch import StopRequested, stop_signals_raise
from bench.network.process import Measured, run_measured
from bench.tables import documents, figures
from common.progress import duration
from common.records import record

COMMAND = "python -m bench gpu"
PREFIX, TINY_PREFIX = "gpu", "tiny"  # of figures' names
RECORDS = "gpu.jsonl"  # in docs/results/records, once folded
_LOOK_S = 0.2  # between looks at what a check has found


def gpu(
    results: Path = Path("runs/gpu.jsonl"),
    only: str | None = None,
    device: str = "cuda",
    tiny: bool = False,
    fold: Path | None = None,
) -> int:
    """Check a machine with GPUs: every feature right, every kernel fast beside what the card allows.

    Takes at most 12 minutes on one GPU and needs no network. The exit status is 1 when a check failed.

    Args:
        results: Where records go, one line each: the file to send back. Checks that ended well in it, of this commit
            and these GPUs, are left out.
        only: Names of checks, separated by commas, to make whatever is in results; all without.
        device: "cuda"; "cpu" with --tiny tries the checks themselves, and says nothing about speed.
        tiny: Smallest sizes.
        fold: Add the records of this file, from whatever machine, to docs/results in place of checking anything.
    """
    if fold is not None:
        return _fold(fold)
    import torch  # takes two seconds, which other commands do without

    count = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: cuda or cpu, got {device}")
    if device == "cuda" and not count:
        raise ValueError("no GPU: torch sees no CUDA device here; --device cpu --tiny tries the checks without one")
    if device == "cpu" and not tiny:
        raise ValueError("device: without --tiny the checks need a GPU's speed and memory")
    began, failed = time.monotonic(), []
    done = finished(results) if only is None and not tiny else set()
    try:
        with stop_signals_raise():
            for name in chosen(only, count or 1):
                if name in done:
                    print(f"{name}: ended well in {results}; --only {name} makes it again", file=sys.stderr)
                    continue
                print(f"{name}: {checks.about(name).says}", file=sys.stderr, flush=True)
                if not check(name, results, device, tiny):
                    failed.append(name)
    except StopRequested as stop:
        print(f"stopped; what was measured until then: {results}", file=sys.stderr)
        return 128 + stop.number
    print(f"{duration(time.monotonic() - began)}; {results}; failed: {', '.join(failed) or 'none'}", file=sys.stderr)
    return 1 if failed else 0


def chosen(only: str | None, gpus: int) -> list[str]:
    """Names of the checks to make, in order.

    Args:
        only: Those that are asked for, separated by commas.
        gpus: How many GPUs there are.

    Raises:
        ValueError: There is no such check, or too few GPUs for it.
    """
    known = checks.names()
    if only is None:
        return [name for name in known if gpus >= checks.about(name).gpus]
    for name in only.split(","):
        if name not in known:
            raise ValueError(f"only: there is no check {name}; there are: {', '.join(known)}")
        if gpus < checks.about(name).gpus:
            raise ValueError(f"only: {name} needs {checks.about(name).gpus} GPUs, here are {gpus}")
    return only.split(",")


def finished(results: Path) -> set[str]:
    """Checks whose last run in a file ended well, with all targets reached, by the code and on the GPUs of now.

    Args:
        results: Where records went; there need be no such file. Of changed code, nothing is finished.
    """
    here = record.stamp()
    if here["git_dirty"] is not False or not results.exists():
        return set()
    well: dict[str, bool] = {}
    missed: set[str] = set()
    for one in record.read(results)[0]:
        figure = str(one.get("figure", ""))
        name = next((name for name in checks.names() if f"{figure}-".startswith(f"{PREFIX}-{name}-")), None)
        if name is None or _made_by(one) != _made_by(here):
            continue
        if figure == f"{PREFIX}-{name}":
            well[name] = one["reached"] is True and name not in missed
            missed.discard(name)
        elif one["reached"] is False:
            missed.add(name)
    return {name for name, good in well.items() if good}


def _made_by(stamped: dict[str, Any]) -> tuple[Any, ...]:
    gpus = [gpu["name"] for gpu in stamped.get("machine", {}).get("gpus", [])]
    return stamped.get("git_commit"), stamped.get("git_dirty"), gpus


def check(name: str, results: Path, device: str, tiny: bool) -> bool:
    """Make one check and append its records; whether it ended well and reached its targets.

    Args:
        name: Its file in ``bench/gpu/checks``.
        results: Where its figures go, as they come, and one that says how the check ended.
        device: "cuda" or "cpu".
        tiny: Smallest sizes.
    """
    limit, prefix, well = checks.about(name).limit_s, TINY_PREFIX if tiny else PREFIX, True

    def take(found: dict[str, Any]) -> None:
        nonlocal well
        well = well and found["reached"] is not False
        figures.append(results, **(found | {"figure": f"{prefix}-{name}-{found['figure']}"}), command=COMMAND)
        print(f"  {found['what']}: {found['value']} {found['unit']}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "found.jsonl", Path(folder) / "output.log"
        arguments = [name, str(lines), device, str(os.getpid()), *(["--tiny"] if tiny else [])]
        with _following(lines, take):
            offline = {"HF_HUB_OFFLINE": "1"}
            ended = run_measured([*child(), *arguments], offline, cwd=documents.ROOT, timeout=limit, log=log)
    problem = _problem(ended, limit)
    figures.append(
        results,
        figure=f"{prefix}-{name}",
        what=f"{checks.about(name).says}" + (f": {problem}" if problem else ""),
        value=ended.wall_s,
        unit="s",
        target=f"ends well within {limit:.0f} s",
        reached=problem is None,
        command=COMMAND,
        details={"output": ended.output if problem else "", "exit_status": ended.returncode, "device": device},
    )
    if problem:
        print(f"  failed: {problem}", file=sys.stderr, flush=True)
    return well and problem is None


def child() -> list[str]:
    """The program that makes one check."""
    return [sys.executable, "-m", "bench.gpu.child"]


@contextmanager
def _following(lines: Path, take: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Hand over what a check writes as it comes, and the rest when it has ended or this process is told to stop.

    Args:
        lines: A JSON object in each; one torn by a kill is none.
        take: Called in a thread of its own.
    """
    ended = threading.Event()

    def follow() -> None:
        taken = 0
        while True:
            last = ended.wait(_LOOK_S)
            whole = lines.read_text("utf-8").split("\n")[:-1] if lines.exists() else []
            for line in whole[taken:]:
                take(json.loads(line))
            taken = len(whole)
            if last:
                return

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            ended.set()
            following.result()


def _problem(ended: Measured, limit: float) -> str | None:
    if ended.timed_out:
        return f"not done in {limit:.0f} s"
    if ended.returncode < 0:
        return f"killed by signal {-ended.returncode}"
    if ended.returncode:
        said = [line for line in ended.output.strip().splitlines() if line.strip()]
        return said[-1][:300] if said else f"exit status {ended.returncode}"
    return None


def _fold(file: Path) -> int:
    """Add a machine's records to those that the pages of results are made from.

    Raises:
        ValueError: Nothing in the file is of a GPU, or a line is broken.
    """
    found, broken = record.read(file)
    if broken:
        raise ValueError(f"{file}: broken line {', '.join(map(str, broken))}")
    mine = [one for one in found if str(one.get("figure", "")).startswith(f"{PREFIX}-")]
    if not mine:
        raise ValueError(f"{file} has no records of {COMMAND} on a GPU")
    into = documents.ROOT / documents.RECORDS / RECORDS
    known = record.read(into)[0] if into.exists() else []
    new = [one for one in mine if one not in known]
    for one in new:
        record.append(into, one)
    print(f"{len(new)} records added to {into}; now: python -m bench table", file=sys.stderr)
    return 0
