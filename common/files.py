"""Result folders that appear complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a folder beside its destination; it takes its place, and that of an earlier one, when the block ends.

    Args:
        folder: Destination.

    Yields:
        An empty folder to write to. When the block fails, it is removed and what was at the destination is still there.

    Raises:
        OSError: The folder cannot be written; the message says where, and that nothing was lost.
    """
    beside, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    except OSError as error:
        kept = "; the earlier one is still there" if folder.exists() else ""
        raise OSError(error.errno, f"cannot write {folder} ({error.strerror or error}){kept}; make room") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
