"""Processes that belong together: none outlives the first one, and none waits for ever to talk to another."""

import os
import sys
import tempfile
import threading
import time
import warnings

_SOCKET_PATH = 107  # bytes of a Unix socket's path on Linux (macOS: 103)
_BELOW_TEMPORARY = len("/pymp-12345678/listener-12345678")  # what Python's multiprocessing appends


def end_with(parent: int, name: str, grace_s: float = 10.0, poll_s: float = 0.5) -> threading.Thread:
    """End this process when its parent is gone, also from inside a call that waits for ever.

    Args:
        parent: Process id of the parent; when it has already ended, so does this process after the grace.
        name: Who this is, for the message.
        grace_s: Seconds to end by itself, as at the end of a run.
        poll_s: Seconds between looks.

    Returns:
        The thread that looks.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        time.sleep(grace_s)
        print(f"{name}: ends, because the process that started it has ended; its output says why", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    thread = threading.Thread(target=watch, name="parent-watch", daemon=True)
    thread.start()
    return thread


def first_on_node() -> bool:
    """Whether this is the first rank of its node, or the only process."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def warn_on_node(said: str) -> None:
    """Warn once, however many ranks of a node find the same; the warning names the caller's caller."""
    if first_on_node():
        warnings.warn(said, stacklevel=3)


def check_temporary_folder() -> None:
    """Refuse a temporary folder whose name is too long for worker processes to hand over tensors.

    They do so through a Unix socket in it. The error occurs in a thread that nobody waits for, and the run would hang.

    Raises:
        ValueError: The folder's path is too long.
    """
    folder, room = tempfile.gettempdir(), _SOCKET_PATH - _BELOW_TEMPORARY
    length = len(os.fsencode(folder))
    if os.name == "posix" and length > room:
        raise ValueError(
            f"TMPDIR: {folder} has {length} bytes, and worker processes need at most {room} for their sockets. "
            "Choose a shorter one (TMPDIR=/tmp), or no workers (--data.num_workers 0)"
        )
