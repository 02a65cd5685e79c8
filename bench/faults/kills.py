"""Chains of kills: start a command, signal one of its processes at a random moment, start again, compare at the end."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from bench.faults.scenarios import Outcome, Scenario
from bench.network.process import kill_tree

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_END_S = 90.0  # a signalled command and all it started have ended by then
_RUN_S = 600.0
# MKL promises the same bits in another process only under this setting.
_REPRODUCIBLE = {"MKL_CBWR": "AVX2,STRICT", "OMP_NUM_THREADS": "1", "CI": "true", "HF_HUB_OFFLINE": "1"}


@dataclass
class Chain:
    """One command killed again and again until it was left to end.

    Attributes:
        scenario: Its name.
        seed: What moments, signals and processes follow from.
        kills: Signal, process and moment of each kill.
        faults: What went wrong, in words; empty when nothing did.
        wall_s: Seconds.
    """

    scenario: str
    seed: int
    kills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def line(self) -> dict:
        """For a file of JSON lines."""
        return asdict(self)


class Started:
    """A command in a folder of its own, and every process seen below it."""

    def __init__(self, command: list[str], folder: Path, cache: Path, log: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **_REPRODUCIBLE, "PARE_CACHE": str(cache)}
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # started in the background of a script, this process may ignore SIGINT; its children must not
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self.root = psutil.Process(self.process.pid)
        self.seen: set[psutil.Process] = {self.root}

    def look(self) -> list[psutil.Process]:
        """The command's living processes that run Pare: ranks, and what started them."""
        with suppress(psutil.NoSuchProcess):
            self.seen.update(self.root.children(recursive=True))
        return [process for process in self.seen if _runs(process)]

    def wait(self, seconds: float) -> bool:
        """Wait until the command and all it started have ended; whether they did."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            living = self.look()
            if self.process.poll() is not None and not living:
                return True
            time.sleep(0.3)  # looking for children costs milliseconds
        return False

    def end(self) -> None:
        """Leave nothing behind."""
        kill_tree(self.root, self.seen)
        self.process.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _moments(scenario: Scenario, folder: Path, typical_s: float, chance: random.Random) -> Iterator[bool]:
    """Becomes true at the moment to strike: at any time, or while something is being saved."""
    started, after = time.monotonic(), chance.uniform(0.02, 0.75) * typical_s
    saving = bool(scenario.saves) and chance.random() < 0.4
    to_skip = chance.randrange(4)  # of the moments in which something is being saved
    before = False
    while True:
        elapsed = time.monotonic() - started
        if saving and elapsed < 2 * typical_s:
            now = any(next(folder.glob(glob), None) is not None for glob in scenario.saves)
            to_skip -= now and not before
            before = now
            yield now and to_skip < 0
        else:
            yield elapsed >= after


def reference(scenario: Scenario, inputs: Path, folder: Path, times: int = 2) -> tuple[Outcome, float]:
    """What the command leaves when nothing disturbs it, and how long it takes: the shortest of some runs.

    The first run of a kind finds nothing in the machine's caches. Moments that are drawn from its length would often
    come when later runs have ended.

    Raises:
        RuntimeError: It failed, or left something else another time.
    """
    left, took = [], []
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        took.append(undisturbed(scenario.command(inputs), folder, _cache(scenario, folder, inputs)))
        left.append(scenario.outcome(folder))
    if any(one != left[0] for one in left):
        raise RuntimeError(f"{scenario.name}: undisturbed runs left different results in {folder}")
    return left[0], min(took)


def undisturbed(command: list[str], folder: Path, cache: Path) -> float:
    """Run a command to its end; seconds it took.

    Raises:
        RuntimeError: It failed, or did not end.
    """
    began, log = time.monotonic(), folder.with_suffix(".log")
    run = Started(command, folder, cache, log)
    ended = run.wait(_RUN_S)
    run.end()
    if not ended or run.process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {_tail(log)}")
    return time.monotonic() - began


def chain(
    scenario: Scenario, kills: int, seed: int, inputs: Path, folder: Path, wanted: Outcome, typical_s: float
) -> Chain:
    """Kill a command ``kills`` times, let it end, and compare what it left with what it leaves undisturbed.

    Args:
        scenario: What to run.
        kills: How often it is killed. A start that ends before its moment comes is not counted, and ends the chain.
        seed: Of moments, signals and processes.
        inputs: Folder of the small model and the prepared cache.
        folder: Working folder of the chain.
        wanted: The undisturbed command's outcome.
        typical_s: How long it takes undisturbed.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a chain that was itself broken off
    found, chance, began = Chain(scenario.name, seed), random.Random(seed), time.monotonic()
    log, cache = folder.with_suffix(".log"), _cache(scenario, folder, inputs)
    finished = False
    while not finished:
        again = scenario.resume if any((folder / place).exists() for place in scenario.begun) else ()
        run = Started([*scenario.command(inputs), *again], folder, cache, log)
        last = len(found.kills) >= kills or not _strike(run, scenario, folder, typical_s, chance, found)
        if not run.wait(_RUN_S if last else _END_S):
            alive = ", ".join(sorted(" ".join(p.cmdline()[:3]) for p in run.look()))
            found.faults.append(f"still running {_END_S:.0f} s after {found.kills[-1:]}: {alive}")
        run.end()
        finished = run.process.returncode == 0
        if last and not finished:
            found.faults.append(f"could not be continued: exit status {run.process.returncode}; {_tail(log)}")
            break
    if finished:
        found.faults += compare(scenario, folder, wanted)
    found.wall_s = time.monotonic() - began
    return found


def compare(scenario: Scenario, folder: Path, wanted: Outcome) -> list[str]:
    """What a finished command left that it would not have left undisturbed, in words."""
    left = scenario.outcome(folder)
    differing = [
        f"{name} differs from that of the undisturbed command" for name in wanted if left[name] != wanted[name]
    ]
    return differing + [f"left behind: {path.name}" for path in _leftovers(folder)]


def _strike(
    run: Started, scenario: Scenario, folder: Path, typical_s: float, chance: random.Random, found: Chain
) -> bool:
    """Signal one of the command's processes once the moment has come; False if the command ended before."""
    began = time.monotonic()
    for now in _moments(scenario, folder, typical_s, chance):
        if run.process.poll() is not None:
            return False
        living = run.look() if now else []
        if living:
            target = chance.choice(sorted(living, key=lambda process: process.pid))
            number = chance.choice(SIGNALS)
            who = "the command" if target == run.root else "a process it started"
            try:
                target.send_signal(number)
            except psutil.NoSuchProcess:
                continue
            saving = any(next(folder.glob(glob), None) is not None for glob in scenario.saves)
            when = f"{time.monotonic() - began:.1f} s" + (", saving" if saving else "")
            found.kills.append(f"{number.name} to {who} after {when}")
            return True
        time.sleep(0.01)
    raise AssertionError("moments never end")


def _cache(scenario: Scenario, folder: Path, inputs: Path) -> Path:
    return folder / "cache" if scenario.fresh_cache else inputs / "cache"


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if any(part in path.name for part in (".partial", ".old", ".tmp"))]


def _tail(log: Path) -> str:
    return log.read_bytes()[-1500:].decode(errors="replace")
