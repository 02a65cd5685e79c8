"""Run a command and measure it from outside: wall time, and peak memory of its whole process tree.

Memory is PSS (proportional set size): pages that processes share are counted once over the tree, so ranks that share
the same libraries are not charged for them again and again.
"""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

_INTERVAL_S = 0.02
# Reading PSS makes the kernel walk page tables; at most this share of one core goes into sampling.
_SAMPLING_SHARE = 0.1
_TAIL_BYTES = 8000


@dataclass(frozen=True)
class Measured:
    """What a command did.

    Attributes:
        command: The arguments it was started with.
        returncode: Exit status; negative for the signal that ended it.
        timed_out: Whether it was killed for exceeding its time limit.
        wall_s: Seconds from start to exit.
        peak_memory_mb: Largest sampled sum over the process tree, MB of 1e6 bytes; None when it ended unsampled.
        memory_kind: "pss", or "rss" where the system does not reveal PSS (shared pages counted in each process).
        output: The last 8000 bytes of stdout and stderr together.
    """

    command: tuple[str, ...]
    returncode: int
    timed_out: bool
    wall_s: float
    peak_memory_mb: float | None
    memory_kind: str
    output: str


class _Sampler(threading.Thread):
    """Samples the memory of a process tree until told to stop, and remembers every process it saw."""

    def __init__(self, root: psutil.Process):
        super().__init__(name="memory-sampler", daemon=True)
        self.root = root
        self.seen: set[psutil.Process] = {root}
        self.peak_bytes = 0
        self.kind = "pss"
        self.finished = threading.Event()

    def run(self) -> None:
        pause = 0.0
        while not self.finished.wait(pause):
            begin = time.perf_counter()
            self.sample()
            pause = max(_INTERVAL_S, (time.perf_counter() - begin) / _SAMPLING_SHARE)

    def sample(self) -> None:
        """Add up the tree's memory once."""
        self.seen.update(_descendants(self.root))
        total = sum(self._memory(process) for process in self.seen)
        self.peak_bytes = max(self.peak_bytes, total)

    def _memory(self, process: psutil.Process) -> int:
        try:
            if self.kind == "pss":
                full = process.memory_full_info()
                if hasattr(full, "pss"):
                    return full.pss
            self.kind = "rss"
            return process.memory_info().rss
        except psutil.AccessDenied:
            # Mixing the two kinds in one sum would mean nothing: from here on everything is RSS.
            self.kind = "rss"
            self.peak_bytes = 0
            return 0
        except psutil.NoSuchProcess:
            return 0


def _descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_tree(root: psutil.Process, also: set[psutil.Process] | frozenset = frozenset()) -> None:
    """Kill a process and all its descendants, and those of `also` that still live.

    psutil compares start times, so a process id that was given to another program meanwhile is left alone.

    Args:
        root: The top of the tree.
        also: Processes once seen in the tree; their parent may be gone, which hides them from a walk of the tree.
    """
    tree = {root, *also}
    while alive := [process for process in tree if process.is_running() and not _is_zombie(process)]:
        for process in alive:
            tree.update(_descendants(process))
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    return file.read().decode(errors="replace")


def run_measured(
    cmd: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike | None = None,
    timeout: float | None = None,
    log: str | os.PathLike | None = None,
) -> Measured:
    """Run a command to its end, with its wall time and the peak memory of its process tree.

    Args:
        cmd: Program and arguments; no shell.
        env: Variables set on top of this process's environment.
        cwd: Working folder.
        timeout: Seconds after which the whole tree is killed; None waits for ever.
        log: File that receives stdout and stderr (replaced); None keeps only the tail.

    Returns:
        The measurements; a non-zero exit status or a timeout is reported there, not raised. Memory is sampled about
        every 20 ms, less often when sampling a large tree would itself take a tenth of a core.

    Raises:
        OSError: The command could not be started.
    """
    command = tuple(map(str, cmd))
    with open(Path(log), "w+b") if log else tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
        timed_out, timer, sampler = threading.Event(), None, None

        def kill() -> None:
            kill_tree(psutil.Process(process.pid), frozenset(sampler.seen if sampler else ()))

        def stop() -> None:
            timed_out.set()
            kill()

        try:
            sampler = _Sampler(psutil.Process(process.pid))
            sampler.start()
            if timeout is not None:
                timer = threading.Timer(timeout, stop)
                timer.start()
            returncode = process.wait()
        except BaseException:  # an interrupted experiment must not leave its command running
            kill()
            process.wait()
            raise
        finally:
            wall_s = time.perf_counter() - begin
            if sampler is not None and sampler.ident is not None:
                sampler.finished.set()
                sampler.join()
            if timer:
                timer.cancel()
                if timed_out.is_set():
                    timer.join()  # let it finish killing before the caller goes on
        peak = sampler.peak_bytes / 1e6 if sampler.peak_bytes else None
        return Measured(command, returncode, timed_out.is_set(), wall_s, peak, sampler.kind, _tail(output))
