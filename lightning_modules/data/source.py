"""Where the records of both splits come from: files, folders, or datasets of the Hugging Face Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from common.progress import stage
from lightning_modules.data.corpus import Corpus, find_corpus
from lightning_modules.data.hub import hub_rows
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

    Args:
        train: File, folder, or name of a Hub dataset.
        val: The same for validation. None takes ``val_split`` of ``train``, or else ``val_percent`` of its records.
        val_percent: Share of the records used for validation where one source is divided.
        hub_config: Configuration of the Hub dataset.
        train_split: Split of the Hub dataset to train on.
        val_split: Split of the Hub dataset to validate on when ``val`` is None.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder that cannot be read, or a ``val_percent`` outside 0 to 100.
    """

    def __init__(
        self,
        train: str,
        val: str | None,
        val_percent: float,
        hub_config: str | None,
        train_split: str,
        val_split: str | None,
    ) -> None:
        check_percent(val_percent)
        self.name = _name(Path(train).expanduser()) if is_path(train) else train.replace("/", "--")
        self.divides = val is None and val_split is None
        self.val_percent, self._config = val_percent, hub_config
        self._parts = [_Part("train", train, train_split)]
        if not self.divides:  # validation first: a training document that is also validated with is left out
            self._parts.insert(0, _Part("val", val or train, val_split or train_split))
        for part in self._parts:
            if is_path(part.source) and (remark := _corpus(part).remark()):
                rank_zero_info(f"{part.field}: not read of {part.source}: {remark}")

    def inputs(self) -> list[Path]:
        """The files and folders that are read, training first."""
        return [Path(part.source).expanduser() for part in self._parts[::-1] if is_path(part.source)]

    def key(self) -> Any:
        """Path, size and time of change of every file, or name and splits of the Hub dataset; JSON-able."""
        key: dict[str, Any] = {part.field: self._identity(part) for part in self._parts}
        return key | {"val_percent": self.val_percent if self.divides else None}

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
        for part in self._parts:
            if not is_path(part.source):
                for number, row in enumerate(hub_rows(part.source, self._config, part.split), 1):
                    yield part.field, row, f"{part.field}: {part.source}, row {number}"
                continue
            files = _corpus(part).files
            size = sum(file.stat().st_size for file in files)
            with stage(f"Reading {Path(part.source).name}", size, "bytes") as done:
                for record, where, position in read_records(files):
                    yield part.field, record, where
                    done(position)


def is_path(source: str) -> bool:
    """Whether a source names a file or folder: it exists, or it cannot be the name of a Hub dataset."""
    path = Path(source).expanduser()
    return path.exists() or not may_be_on_hub(source) or path.suffix.lower() in READERS


def _name(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name or "text"


def _corpus(part: _Part) -> Corpus:
    path = Path(part.source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{part.field}: no such file or folder: {part.source}")
    return find_corpus(path)
