"""Where prepared data lie, and the lock that guards them."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from common.files import remove

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}


def cache_root(cache_dir: str | None) -> Path:
    """The folder for all prepared data: ``cache_dir``, else ``$PARE_CACHE``, else ``~/.cache/pare``."""
    return Path(cache_dir or os.environ.get("PARE_CACHE") or "~/.cache/pare").expanduser().resolve() / "data"


@contextmanager
def explain_unwritable(root: Path) -> Iterator[None]:
    """Turn "no space left" and its kin, met while writing below ``root``, into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        about = Path(os.fsdecode(error.filename)) if error.filename else root
        ours = about.is_relative_to(root) or root.is_relative_to(about)
        if not ours or error.errno not in _CANNOT_WRITE | _NO_FOLDER:
            raise
        raise ValueError(
            f"cache_dir: cannot write the prepared data below {root} ({error.strerror or error}); make room and start "
            "again (what is finished is kept), or set cache_dir or $PARE_CACHE to another folder"
        ) from error


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock between processes; the system frees it when its holder dies, however it dies.

    ``lockf`` rather than ``flock`` or the filelock package: its lock belongs to this process alone, so a forked child
    that outlives a killed parent does not keep it.

    Yields:
        True with the lock held; False only where ``wait`` is false and another process holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                yield False
                return
            rank_zero_info(f"Another process is preparing this data; waiting for it ({path})")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield True


def remove_leftovers(ours: Path) -> None:
    """Delete what dead preparations left half-written beside the folder ``ours``, whose lock the caller holds.

    Living preparations hold their lock and keep theirs.
    """
    for partial in ours.parent.glob("*/**/.*.partial*"):
        folder = ours.parent / partial.relative_to(ours.parent).parts[0]
        # Our own are overwritten in due course; and to open our lock file again would, on closing it, free the lock.
        if folder == ours:
            continue
        with locked(lock_of(folder), wait=False) as dead:
            if dead:
                remove(partial)


def lock_of(folder: Path) -> Path:
    """The lock file that guards a cache folder."""
    return folder.with_name(folder.name + ".lock")
