"""Where the records of both splits come from: files, folders, or datasets of the Hugging Face Hub."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from common.progress import stage
from lightning_modules.data.corpus import Corpus, find_corpus
from lightning_modules.data.hub import hub_rows
from lightning_modules.data.json_records import Record
from lightning_modules.data.readers import READERS, check_percent, read_records
from lightning_modules.loading import may_be_on_hub


class _Part(NamedTuple):
    field: str
    """``"val"`` or ``"train"``: the argument, and the split of its records unless they are to be divided."""
    source: str
    split: str
    """Of a Hub dataset."""


class Source:
    """Records of a training and a validation source, or of one that is divided into both.

    A source may be several files, folders or datasets: then they take turns, so that each has given as much text as the
    others wherever one stops, until one of them ends.

    Args:
        train: File, folder, or name of a Hub dataset; or a list of these.
        val: The same for validation. None takes ``val_split`` of ``train``, or else ``val_percent`` of its records.
        val_percent: Share of the records used for validation where one source is divided.
        hub_config: Configuration of the Hub dataset.
        train_split: Split of the Hub dataset to train on.
        val_split: Split of the Hub dataset to validate on when ``val`` is None.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder that cannot be read, an empty list, or a ``val_percent`` outside 0 to 100.
    """

    def __init__(
        self,
        train: str | Sequence[str],
        val: str | Sequence[str] | None,
        val_percent: float,
        hub_config: str | None,
        train_split: str,
        val_split: str | None,
    ) -> None:
        check_percent(val_percent)
        self.name = "+".join(_name(source) for source in _several("train", train))
        self.divides = val is None and val_split is None
        self.val_percent, self._config = val_percent, hub_config
        self._parts = {"train": [_Part("train", source, train_split) for source in _several("train", train)]}
        if not self.divides:  # validation first: a training document that is also validated with is left out
            sources = _several("val", train if val is None else val)
            self._parts = {"val": [_Part("val", source, val_split or train_split) for source in sources], **self._parts}
        for part in itertools.chain(*self._parts.values()):
            if is_path(part.source) and (remark := _corpus(part).remark()):
                rank_zero_info(f"{part.field}: not read of {part.source}: {remark}")

    def inputs(self) -> list[Path]:
        """The files and folders that are read, training first."""
        parts = itertools.chain(*(self._parts.get(field, []) for field in ("train", "val")))
        return [Path(part.source).expanduser() for part in parts if is_path(part.source)]

    def key(self) -> Any:
        """Path, size and time of change of every file, or name and splits of the Hub dataset; JSON-able."""
        key: dict[str, Any] = {"val_percent": self.val_percent if self.divides else None}
        for field, parts in self._parts.items():
            found = [self._identity(part) for part in parts]
            key[field] = found[0] if len(found) == 1 else {"in turns": found}
        return key

    def _identity(self, part: _Part) -> Any:
        if not is_path(part.source):
            return [part.source, self._config, part.split]
        return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in _corpus(part).files]

    def records(self) -> Iterator[tuple[str, Any, str]]:
        """Field ("val" first, then "train"), record, and how to call it in an error; always in the same order.

        Raises:
            FileNotFoundError: a Hub dataset that is not there.
            ValueError: a file that cannot be read.
        """
        for field, parts in self._parts.items():
            size = sum(file.stat().st_size for part in parts if is_path(part.source) for file in _corpus(part).files)
            title = "Reading " + ", ".join(Path(part.source).name for part in parts)
            with stage(title, size, "bytes") if size else nullcontext(lambda read: None) as done:
                read = [0] * len(parts)
                for number, (record, where, position) in _in_turns([self._read(part) for part in parts]):
                    yield field, record, where
                    read[number] = position
                    done(sum(read))

    def _read(self, part: _Part) -> Iterator[Record]:
        if is_path(part.source):
            yield from read_records(_corpus(part).files)
            return
        for number, row in enumerate(hub_rows(part.source, self._config, part.split), 1):
            yield row, f"{part.field}: {part.source}, row {number}", 0


def _in_turns(sources: Sequence[Iterator[Record]]) -> Iterator[tuple[int, Record]]:
    """Number of a source and its next record, always of the one that has given least text, until one has no more."""
    given = [0] * len(sources)
    while True:
        number = given.index(min(given))
        record = next(sources[number], None)
        if record is None:
            return
        yield number, record
        given[number] += 1 + _letters(record[0])


def _letters(record: Any) -> int:
    """Characters of all texts in a record."""
    return sum(len(value) for value in record.values() if isinstance(value, str)) if isinstance(record, dict) else 0


def _several(field: str, sources: str | Sequence[str]) -> Sequence[str]:
    found = [sources] if isinstance(sources, str) else sources
    if not found:
        raise ValueError(f"{field}: an empty list; name at least one file, folder or dataset")
    return found


def is_path(source: str) -> bool:
    """Whether a source names a file or folder: it exists, or it cannot be the name of a Hub dataset."""
    path = Path(source).expanduser()
    return path.exists() or not may_be_on_hub(source) or path.suffix.lower() in READERS


def _name(source: str) -> str:
    if not is_path(source):
        return source.replace("/", "--")
    path = Path(source).expanduser()
    return path.name if path.name not in ("", "..") else path.resolve().name or "text"


def _corpus(part: _Part) -> Corpus:
    path = Path(part.source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{part.field}: no such file or folder: {part.source}")
    return find_corpus(path)
