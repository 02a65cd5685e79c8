"""Where prepared data lie, and who may prepare them."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from common.files import remove, replacing, write_refused
from common.locks import InUseError, lock
from common.manifest import MARKER, names, read_manifest


def cache_root(cache_dir: str | None) -> Path:
    """The folder for all prepared data: ``cache_dir``, else ``$PARE_CACHE``, else ``~/.cache/pare``."""
    return Path(cache_dir or os.environ.get("PARE_CACHE") or "~/.cache/pare").expanduser().resolve() / "data"


@contextmanager
def explain_unwritable(root: Path) -> Iterator[None]:
    """Turn "no space left" and its kin, met while writing below ``root``, into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        if (reason := write_refused(error, root)) is None:
            raise
        raise ValueError(
            f"cache_dir: cannot write the prepared data below {root} ({reason}); make room and start "
            "again (what is finished is kept), or set cache_dir or $PARE_CACHE to another folder"
        ) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process that prepares a cache folder; waits for another one, and says so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder))
        except InUseError as other:
            rank_zero_info(f"Waiting for another process that prepares this data ({other})")
            held.enter_context(lock(folder, wait=True))
        yield


@contextmanager
def begin(folder: Path) -> Iterator[None]:
    """Have a cache folder, marked as Pare's from the first moment; removed again if nothing gets finished in it."""
    if not folder.exists():
        with replacing(folder, "cache"):
            pass
    try:
        yield
    finally:
        if names(folder) in ([], [MARKER]):
            remove(folder)


def remove_leftovers(ours: Path) -> None:
    """Delete what dead preparations left half-written in the folder ``ours``, whose lock the caller holds, and beside.

    Living preparations hold their lock and keep theirs. What Pare did not mark is somebody else's.
    """
    for folder in ours.parent.iterdir():
        manifest = read_manifest(folder) if (folder / MARKER).is_file() else None
        if manifest is not None and manifest["kind"] == "cache":
            with suppress(InUseError), lock(folder):
                for leftover in [*folder.rglob(".*.partial*"), *folder.rglob(".*.lock")]:
                    remove(leftover)
