"""What a folder of Pare's holds: ``pare.json`` names every file with its bytes and SHA-256.

It marks the folder as one that may be replaced, and lets a reader notice damage. Hashing runs over files that have just
been written or will be read anyway, at the speed of one core's SHA-256 (about a gigabyte a second).
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.progress import stage

MARKER = "pare.json"
CARD = "README.md"

_THREADS = 8  # that read and hash at once; hashlib lets other threads run
_SILENT = 2 << 30  # bytes that are checked without showing progress: a second or two


class DamagedError(ValueError):
    """A file is missing, cut short or not what was written."""


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
    beside = folder / ".pare.partial.json" if marker.exists() else marker  # others may read the earlier one meanwhile
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
        contents: Read the files, with progress where there is much to read. False compares sizes alone, which takes no
            time.

    Returns:
        The manifest; None for a folder without one.

    Raises:
        DamagedError: Naming the first file that is missing, cut short or changed.
    """
    folder = Path(folder).expanduser()
    if not (folder / MARKER).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest is None or manifest["files"] is None:
        raise DamagedError(f"{folder / MARKER} is damaged; {_remedy(folder)}")
    check_files(folder, dict(list(manifest["files"].items())[part[0] :: part[1]]), contents)
    return manifest


def check_files(folder: Path, files: dict[str, dict[str, Any]], contents: bool = True) -> None:
    """Compare files with what ``hashes`` said of them: first all sizes, then all contents, several files at a time.

    Args:
        folder: Where they lie.
        files: Bytes and SHA-256 by name.
        contents: See ``check_manifest``.

    Raises:
        DamagedError: See ``check_manifest``.
    """
    known = {folder / name: expected for name, expected in files.items() if name != CARD}
    for path, expected in known.items():
        if not path.is_file():
            raise DamagedError(f"{path} is missing; {_remedy(folder)}")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{path} has {size:,} bytes instead of {expected['bytes']:,}; {_remedy(folder)}")
    if not contents:
        return
    total, checked = sum(expected["bytes"] for expected in known.values()), 0
    shown = stage(f"Checking {folder}", total, "bytes") if total > _SILENT else nullcontext(lambda done: None)
    with shown as done, ThreadPoolExecutor(_THREADS) as pool:
        for (path, expected), found in zip(known.items(), pool.map(_sha256, known), strict=True):
            if found != expected["sha256"]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DamagedError(f"{path} is not what was written (its SHA-256 differs); {_remedy(folder)}")
            done(checked := checked + expected["bytes"])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(folder: Path) -> str:
    return f"write or fetch {folder} again, or delete its {MARKER} if you changed it on purpose"


def read_manifest(folder: Path) -> dict[str, Any] | None:
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


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk: a rename may overtake what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
