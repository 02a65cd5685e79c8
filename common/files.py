"""Results that appear complete or not at all, in folders that are Pare's to write, with a manifest of what was written.

The one way in which Pare writes a folder or a file that others read: beside its destination, then renamed. A folder
that Pare wrote holds ``pare.json``: what it is, and bytes and SHA-256 of every file. It marks the folder as one that
may be replaced, and lets a reader notice damage. Hashing runs over files that have just been written or will be read
anyway, at the speed of one core's SHA-256 (about a gigabyte a second).
"""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MARKER = "pare.json"
CARD = "README.md"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EIO}
# safetensors, torch.save ("unexpected pos") and torch's checkpoint writer do not raise OSError when the disk is full
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "unexpected pos")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # file systems without locks
_held: dict[tuple[int, Path], int] = {}  # how often this process (a forked child is another) holds each lock


class DamagedError(ValueError):
    """A file is missing, cut short or not what was written."""


class InUseError(ValueError):
    """Another process is writing here."""


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
            written to.
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
    manifest = _read_manifest(folder) if (folder / MARKER).is_file() else None
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
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path, wait=True):
            try:
                yield partial
                if path.exists():
                    shutil.copymode(path, partial)
                sync(partial)
                partial.replace(path)
                sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)


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
        full, elsewhere = disk_full(error), getattr(error, "filename", None)
        ours = elsewhere is None or Path(os.fsdecode(elsewhere)).is_relative_to(path.parent)
        if not full and not (ours and getattr(error, "errno", None) in _REFUSED):
            raise  # not about writing: the block may well read, too
        kept = "; the earlier one is still there" if os.path.lexists(path) else ""
        reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        advice = f"; make room in {path.parent}" if full else ""
        number = errno.ENOSPC if full else getattr(error, "errno", None)
        raise OSError(number, f"cannot write {path} ({reason}){kept}{advice}") from error


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
    """Where a replacement of ``path`` is written."""
    return path.with_name(f".{path.name}.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk: a rename may overtake what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- manifests ------------------------------------------------------------------------------------------------------


def hashes(folder: Path, only: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of a folder's files, all of which reach the disk before this returns.

    A model card is named without them: people edit it.

    Args:
        folder: What was written.
        only: These names, relative to it; by default all but the marker.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names(folder) if only is None else only:
        if name == MARKER:
            continue
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            if name == CARD:
                found[name] = {"bytes": None, "sha256": None}
                continue
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[name] = {"bytes": file.tell(), "sha256": digest}
    return found


def write_manifest(folder: Path, kind: str, files: dict[str, dict[str, Any]] | None, ranks: int | None = None) -> None:
    """Write ``pare.json``; None for ``files`` says that the folder is not complete."""
    manifest: dict[str, Any] = {"pare": 1, "kind": kind, "ranks": ranks, "files": files and dict(sorted(files.items()))}
    manifest["sha256"] = _digest(manifest)
    marker = folder / MARKER
    beside = folder / f".{MARKER}.partial" if marker.exists() else marker  # others may read the earlier one meanwhile
    beside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(beside)
    beside.replace(marker)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(inner)


def check_manifest(folder: str | Path, part: tuple[int, int] = (0, 1), contents: bool = True) -> dict[str, Any] | None:
    """Compare a folder with its manifest; files that the manifest does not name are the user's own.

    Args:
        folder: What is to be read.
        part: (i, n) looks at every n-th file from the i-th, so that n processes share the work.
        contents: Read the files. False compares sizes alone, which takes no time.

    Returns:
        The manifest; None for a folder without one.

    Raises:
        DamagedError: Naming the first file that is missing, cut short or changed.
    """
    folder = Path(folder).expanduser()
    if not (folder / MARKER).is_file():
        return None
    manifest = _read_manifest(folder)
    if manifest is None or manifest["files"] is None:
        raise DamagedError(f"{folder / MARKER} is damaged; {_remedy(folder)}")
    for name, expected in list(manifest["files"].items())[part[0] :: part[1]]:
        path = folder / name
        if name == CARD:
            continue
        if not path.is_file():
            raise DamagedError(f"{path} is missing; {_remedy(folder)}")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{path} has {size:,} bytes instead of {expected['bytes']:,}; {_remedy(folder)}")
        if not contents:
            continue
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise DamagedError(f"{path} is not what was written (its SHA-256 differs); {_remedy(folder)}")
    return manifest


def _remedy(folder: Path) -> str:
    return f"write or fetch {folder} again, or delete its {MARKER} if you changed it on purpose"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where the file is no manifest, or is damaged."""
    try:
        manifest = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return manifest if manifest["pare"] == 1 and manifest["sha256"] == _digest(manifest) else None
    except (ValueError, KeyError, TypeError):
        return None


def _digest(manifest: dict[str, Any]) -> str:
    """Hash of the manifest itself: else a flipped bit in it would be blamed on the file that it describes."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def names(folder: Path) -> list[str]:
    """Names of all files and links below a folder, relative to it."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )


# ---- one writer -----------------------------------------------------------------------------------------------------


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
    name = path.with_name(f".{path.name}.lock")
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
