"""Which files a corpus consists of."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_modules.data.readers import READERS


class Corpus(NamedTuple):
    """The files of a corpus, in a fixed order, and what of its folder was passed over."""

    files: list[Path]
    left_out: list[tuple[str, str]]
    """Name, relative to the folder, and why."""

    def remark(self) -> str:
        """What was left out and why, in one line; empty where nothing was."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        return "; ".join(
            f"{len(names)} {reason} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for reason, names in reasons.items()
        )


def find_corpus(path: Path) -> Corpus:
    """A file, or all files with a known suffix in a folder and the folders below it.

    One rule for folders: links are followed; every file and every folder counts once, under the first of its names; and
    what is hidden (a name that begins with a dot) is passed over with all below it.

    Args:
        path: File or folder, which may itself be hidden or a link.

    Raises:
        OSError: a folder that cannot be listed.
        ValueError: a folder without a readable file, a file with an unknown suffix, or an empty file.
    """
    known = ", ".join(READERS)
    left_out: list[tuple[str, str]] = []
    if path.is_dir():
        files = list(_walk(path, path, {_identity(path)}, left_out))
        if not files:
            remark = Corpus([], left_out).remark()
            found = f"; it has {remark}" if remark else ""
            raise ValueError(f"{path}: no file that can be read in this folder (known: {known}){found}")
    elif path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: unknown kind of file '{path.suffix}' (known: {known}); rename or convert it")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty; give a file with text, or delete it from the corpus")
    return Corpus(files, left_out)


def _walk(root: Path, folder: Path, seen: set[tuple[int, int]], left_out: list[tuple[str, str]]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if reason := _unwanted(path, seen):
            left_out.append((str(path.relative_to(root)), reason))
        elif path.is_dir():
            seen.add(_identity(path))
            yield from _walk(root, path, seen, left_out)
        else:
            seen.add(_identity(path))
            yield path


def _unwanted(path: Path, seen: set[tuple[int, int]]) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if not path.exists():
        return "links to nothing"
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in READERS):
        return "of another kind"
    return "under another name already" if _identity(path) in seen else None


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
