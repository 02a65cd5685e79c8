"""Start one process a host, show their output, and stop all of them when one fails or the launcher is told to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import psutil

from bench.network.process import kill_tree

# Time a host has to end by itself (write a checkpoint, say) after it was told to stop.
GRACE_S = 20.0
_POLL_S = 0.02
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Host:
    """A command, the variables it sees on top of this process's environment, and its name in output."""

    command: Sequence[str]
    environment: Mapping[str, str]
    name: str


@dataclass(frozen=True)
class Outcome:
    """Exit status of each host (128 + signal number when a signal ended it), of the whole, and seconds it took."""

    exits: list[int]
    status: int
    wall_s: float


class StopRequested(Exception):
    """A signal asked the launcher to stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Turn the first stop signal into StopRequested; ignore those that follow, so that cleaning up completes.

    Works in the main thread only, where Python delivers signals.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise StopRequested(number)

    previous = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _start(host: Host, index: int) -> tuple[subprocess.Popen, threading.Thread | None]:
    """Start a host in its own session. Host 0 writes straight to this terminal, the others through a prefix."""
    process = subprocess.Popen(
        host.command,
        env={**os.environ, **host.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if index else None,
        stderr=subprocess.STDOUT if index else None,
        start_new_session=True,
    )
    if index == 0:
        return process, None

    def forward() -> None:
        for line in process.stdout or ():
            sys.stdout.write(f"[{host.name}] {line.decode(errors='replace').rstrip()}\n")
            sys.stdout.flush()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    return process, thread


def stop_processes(processes: Sequence[subprocess.Popen], number: int) -> None:
    """Pass a signal on to the hosts still running; kill with their children those that outlive the grace."""
    running = [process for process in processes if process.poll() is None]
    trees = [psutil.Process(process.pid) for process in running]
    for process in running:
        process.send_signal(number)
    deadline = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for process, tree in zip(running, trees, strict=True):
        if process.poll() is None:
            kill_tree(tree)
            process.wait()


def _wait(processes: Sequence[subprocess.Popen], names: Sequence[str]) -> int:
    """Wait for all hosts, or for the first that fails; then stop the others. Returns the overall exit status."""
    while True:
        codes = [process.poll() for process in processes]
        failures = [(i, _exit_status(code)) for i, code in enumerate(codes) if code]
        if failures:
            failed, status = failures[0]
            others = ", ".join(names[i] for i, code in enumerate(codes) if code is None)
            _say(f"{names[failed]} failed with exit status {status}" + (f"; stopping {others}" if others else ""))
            stop_processes(processes, signal.SIGTERM)
            return status
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_S)


def _exit_status(code: int) -> int:
    return code if code >= 0 else 128 - code


def run_hosts(hosts: Sequence[Host]) -> Outcome:
    """Run all hosts to their end.

    Output of host 0 goes where this process's goes; lines of the others come prefixed with their names. When a host
    fails, or StopRequested is raised (see `stop_signals_raise`), the others are told to stop, and killed after
    `GRACE_S` seconds.

    Raises:
        OSError: A command could not be started; the others are stopped.
    """
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    begin = time.monotonic()
    try:
        for index, host in enumerate(hosts):
            process, reader = _start(host, index)
            processes.append(process)
            readers += [reader] if reader else []
        status = _wait(processes, [host.name for host in hosts])
    except StopRequested as stop:
        _say(f"{signal.Signals(stop.number).name}: stopping all hosts")
        stop_processes(processes, stop.number)
        status = 128 + stop.number
    except BaseException:
        stop_processes(processes, signal.SIGTERM)
        raise
    for reader in readers:
        reader.join(timeout=5)  # a grandchild may hold the pipe open; its host is gone, do not wait for it
    return Outcome([_exit_status(process.wait()) for process in processes], status, time.monotonic() - begin)
