"""Checkpoints that exist only when they are complete."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import recover, remove, swap


@contextmanager
def replace_when_complete(path: Path, barrier: Callable[[], None], rank: int) -> Iterator[Path]:
    """Yield a path beside ``path`` for all ranks to write to; rank 0 renames it once every rank is done.

    A process killed while writing leaves the previous ``path`` whole and a hidden ``.NAME.partial`` that the next save
    removes. (An existing *folder* cannot be replaced in one step: it is moved aside first, so that at any moment one
    complete copy is on disk.)

    Args:
        path: The checkpoint's final file or folder.
        barrier: Waits for all ranks.
        rank: This process's rank.

    Raises:
        OSError: Writing failed; the message names the path.
    """
    beside, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        remove(beside)
        remove(old)
    barrier()
    try:
        yield beside
    except Exception as error:
        # torch's writers report a full disk as a corrupt archive; say what it means for the user
        if rank == 0:
            remove(beside)
        raise OSError(
            f"could not save the checkpoint {path} ({error}); an earlier one is untouched. Make room in "
            f"{path.parent}, check that it can be written to, or choose another dirpath"
        ) from error
    barrier()
    if rank == 0:
        swap(beside, path)
    barrier()
