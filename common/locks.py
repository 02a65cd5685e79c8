"""One writer at a time."""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # file systems without locks
_held: dict[tuple[int, Path], int] = {}  # how often this process (a forked child is another) holds each lock


class InUseError(ValueError):
    """Another process is writing here."""


@contextmanager
def lock(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes a folder or file; the lock lies beside it, as ``.NAME.lock``.

    The system frees it when its holder dies, however it dies. ``lockf`` rather than ``flock`` or the filelock package:
    its lock belongs to this process alone, so a forked child that outlives a killed parent does not keep it. The same
    process may take it again within.

    Args:
        path: What is written; its parent folder must exist.
        wait: Wait for the other process, instead of refusing.

    Raises:
        InUseError: Another process holds it; the message names that run.
    """
    path = Path(path).expanduser().resolve()
    key = (os.getpid(), path)
    if _held.get(key):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    name = lock_of(path)
    with _locked(path, name, wait) as file:
        try:
            _held[key] = 1
            file.seek(0)
            file.truncate()
            json.dump(_myself(), file)
            file.flush()
            yield
        finally:
            _held.pop(key, None)
            name.unlink(missing_ok=True)  # while it is held: who waits for it looks whether it still has its name


def lock_of(path: Path) -> Path:
    """The lock's file."""
    return path.with_name(f".{path.name}.lock")


def _locked(path: Path, name: Path, wait: bool) -> Any:
    """The lock's file, open and locked."""
    while True:
        file = open(name, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"no locks on the file system of {path}: see that only one run writes there", stacklevel=2
                )
                return file
            other = _holder(file)
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise InUseError(
                f"{path} is being written by another run ({other}); wait for it, stop it, or choose another folder"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), name.stat()):
                return file
        file.close()  # its last holder has deleted it


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv), "since": since}


def _holder(file: Any) -> str:
    try:
        file.seek(0)
        other = json.load(file)
        return f"process {other['pid']} on {other['host']} since {other['since']}: {other['command']}"
    except (ValueError, KeyError, TypeError):
        return "unknown"
