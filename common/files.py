"""Results that appear complete or not at all, in folders that are Pare's to write.

The one way in which Pare writes a folder or a file that others read: beside its destination, then renamed. A folder
holds a manifest of what was written (``common.manifest``), and has one writer at a time (``common.locks``).
"""

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.locks import InUseError, lock, lock_of
from common.manifest import MARKER, hashes, names, read_manifest, sync, write_manifest

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EIO}
# safetensors, torch.save ("unexpected pos") and torch's checkpoint writer do not raise OSError when the disk is full
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "unexpected pos")


# ---- before any work ------------------------------------------------------------------------------------------------


def check_output(
    folder: str | Path, field: str, inputs: Iterable[str | Path | None] = (), overwrite: bool = False
) -> None:
    """Refuse, before any work, a destination that would cost the user something.

    Nothing there, or an empty folder, is fine; so is Pare's own earlier result, which stays until the new one is
    complete. Everything else needs ``overwrite``; an input is refused always.

    Args:
        folder: Destination; may be that of a file, of which an existing one always needs ``overwrite``.
        field: The argument that gave it, for the message.
        inputs: What the command reads: folders, files; hub names and None are passed over.
        overwrite: Replace a folder that Pare did not write.

    Raises:
        ValueError: The destination is, contains or lies inside an input; or holds what Pare did not write; or cannot be
            written to, or is where a volume is mounted.
    """
    folder = Path(folder).expanduser().resolve()
    recover(folder)
    for given in inputs:
        if given is None or not os.path.lexists(source := Path(given).expanduser()):
            continue
        source = source.resolve()
        if source == folder or source in folder.parents or folder in source.parents:
            relation = "is" if source == folder else "lies inside" if source in folder.parents else "contains"
            raise ValueError(f"{field}: {folder} {relation} the input {given}; choose a folder apart from it")
    if not overwrite and folder.is_file():
        raise ValueError(
            f"{field}: {folder} is a file that exists; choose another name, or allow its loss with overwrite"
        )
    if os.path.ismount(folder):  # it cannot be renamed, and so nothing can take its place
        raise ValueError(
            f"{field}: {folder} is where a volume is mounted, and cannot be replaced as a whole; choose a folder in it"
        )
    if not overwrite and (found := _foreign(folder)) is not None:
        raise ValueError(
            f"{field}: {folder} holds what Pare did not write ({found}); choose another folder, or allow its loss with "
            "overwrite"
        )
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{field}: cannot write {folder}: {above} is no folder that you may write to")


def inputs_of(*parts: Any) -> list[str | Path | None]:
    """What modules and DataModules read, for ``check_output``: their ``inputs()``, where they have that method."""
    return [path for part in parts for path in getattr(part, "inputs", list)()]


def _foreign(folder: Path) -> str | None:
    """The first thing in a folder that Pare did not write; None when all is Pare's, or nothing is there."""
    if not folder.is_dir():
        return folder.name if os.path.lexists(folder) else None
    manifest = read_manifest(folder) if (folder / MARKER).is_file() else None
    ours = set(manifest["files"] or {}) | {MARKER} if manifest is not None else set()
    return next((name for name in names(folder) if name not in ours and "__pycache__" not in name), None)


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(
    folder: str | Path, kind: str, inputs: Iterable[str | Path | None] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Write a folder beside its destination; it takes its place, and that of an earlier one, when the block ends.

    Args:
        folder: Destination; through a symbolic link, what it points to.
        kind: What it is: "model", "checkpoint", "cache", "plan", …
        inputs: See ``check_output``, which is asked again.
        overwrite: See ``check_output``.

    Yields:
        A folder to write to, empty but for its marker. When the block fails, it is removed and what was at the
        destination is still there.

    Raises:
        InUseError: Another process is writing this folder.
        OSError: The folder cannot be written; the message says where, and that nothing was lost.
        ValueError: See ``check_output``.
    """
    folder = Path(folder).expanduser().resolve()
    check_output(folder, kind, inputs, overwrite)
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            partial = start(folder, kind)
            try:
                yield partial
                _share(*(path for path in partial.rglob("*") if path.is_file() and not path.is_symlink()))
                write_manifest(partial, kind, hashes(partial))
                swap(partial, folder)
            finally:
                remove(partial)


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Write a file beside its destination; it takes its place when the block ends.

    Args:
        path: Destination; through a symbolic link, what it points to. Its folder is made when missing.

    Yields:
        A path with the same suffix to write to. When the block fails, it is removed and the old file is still there.

    Raises:
        OSError: The file cannot be written; the message says where.
    """
    path = Path(path).expanduser().resolve()
    partial = partial_of(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path, wait=True):
            try:
                yield partial
                if path.exists():
                    shutil.copymode(path, partial)
                else:
                    _share(partial)
                sync(partial)
                partial.replace(path)
                sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)


def _share(*files: Path) -> None:
    """Give files the mode that the umask allows: safetensors writes files that none but their owner may read."""
    umask = os.umask(0o077)  # there is no other way to read it
    os.umask(umask)
    for path in files:
        mode = path.stat().st_mode
        if (wanted := mode | (0o666 & ~umask)) != mode:
            with suppress(OSError):  # a file system without modes
                path.chmod(wanted)


def write_text(path: str | Path, text: str) -> None:
    """``Path.write_text`` in UTF-8, through ``replacing_file``."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing ``path`` into a message that names it, says what is kept and what to do."""
    try:
        yield
    except Exception as error:
        reason, full = write_refused(error, path), disk_full(error)
        if reason is None:
            raise  # not about writing: the block may well read, too
        kept = "; the earlier one is still there" if os.path.lexists(path) else ""
        advice = f"; make room in {path.parent}" if full else ""
        number = errno.ENOSPC if full else getattr(error, "errno", None)
        raise OSError(number, f"cannot write {path} ({reason}){kept}{advice}") from error


def write_refused(error: BaseException, below: Path) -> str | None:
    """Why ``below`` could not be written; None where an error is not about that, such as one of reading a neighbour.

    Args:
        error: Met while ``below`` was being written.
        below: A file or folder, absolute; what is beside it on its behalf, and the folders above it, belong to it.
    """
    if disk_full(error):
        return "the disk is full"
    number, about = getattr(error, "errno", None), getattr(error, "filename", None)
    if number not in _REFUSED or (about is None and number == errno.EIO):  # EIO without a name is a read's as well
        return None
    if about is not None:
        named = Path(os.fsdecode(about)).resolve()
        ours = (below, partial_of(below), _old(below), lock_of(below))
        if not below.is_relative_to(named) and not any(named.is_relative_to(own) for own in ours):
            return None
    return getattr(error, "strerror", None) or str(error)


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that there is no room to write."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- the steps of a replacement, for writers that are several processes ---------------------------------------------


def start(path: Path, kind: str | None = None) -> Path:
    """Make room for writing beside ``path``; with ``kind``, make the folder to write to, marked as Pare's.

    The marker comes first, so that what is removed later, also after a kill, is known to be Pare's.
    """
    recover(path)
    partial = partial_of(path)
    _remove_ours(partial)
    _remove_ours(_old(path))
    if kind is not None:
        partial.mkdir(parents=True)
        write_manifest(partial, kind, None)
    return partial


def swap(partial: Path, path: Path) -> None:
    """Put what was written at ``partial`` in the place of ``path``.

    A folder cannot be replaced in one step. So the old one moves aside, the new one takes its name, and only then does
    the old one go: at every moment a complete one is there, and ``recover`` finds it after a kill in between.
    """
    old = _old(path)
    if os.path.lexists(path):
        path.rename(old)
    partial.rename(path)
    sync(path.parent)  # else a power cut could bring back neither name
    remove(old)


def recover(path: Path) -> None:
    """Undo a replacement that was killed between its two renames: the old one gets its name back.

    A process that is writing there, or recovering, too, is left alone: it needs but a moment between its renames.
    """
    old = _old(path)
    for _ in range(20):
        if os.path.lexists(path) or not os.path.lexists(old):
            return
        with suppress(InUseError), lock(path):
            if os.path.lexists(old) and not os.path.lexists(path):
                old.rename(path)
                sync(path.parent)
            return
        time.sleep(0.05)


def recover_all(folder: Path) -> None:
    """``recover`` everything whose name is missing in a folder."""
    for old in folder.glob(".*.old"):
        recover(old.with_name(old.name.removeprefix(".").removesuffix(".old")))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_ours(leftover: Path) -> None:
    """Delete what a killed run left, unless it is a folder of somebody else's that merely has such a name."""
    if leftover.is_dir() and any(leftover.iterdir()) and not (leftover / MARKER).is_file():
        raise ValueError(f"{leftover} is in the way, and Pare did not write it: move or delete it")
    remove(leftover)


def partial_of(path: Path) -> Path:
    """Where a replacement of ``path`` is written; it has the same suffix, by which some writers choose a format."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
