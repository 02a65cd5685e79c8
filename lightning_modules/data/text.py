"""The user's own text: files, folders, or a dataset of the Hugging Face Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.progress import stage
from lightning_modules.data.base import TextDataModule
from lightning_modules.data.hub import hub_documents
from lightning_modules.data.readers import (
    READERS,
    check_percent,
    corpus_files,
    in_validation,
    read_documents,
    text_digest,
)


class TextCorpus(TextDataModule):
    """Text from JSON arrays, JSON lines, plain text files, folders of these, or a Hub dataset.

    JSON records look like ``{"id": ..., "title": ..., "text": ...}``, of which only the text is required; the title
    is put above the text. A plain text file is one document, a long one several of about 16,000 characters.
    Validation documents never also appear in the training split.

    Args:
        train: File (.json, .jsonl, .txt), folder, or name of a Hub dataset. Only a named Hub dataset is downloaded.
        val: The same for validation. None takes ``val_percent`` of the training documents.
        val_percent: Share of the documents used for validation when ``val`` is None, chosen by a hash of their text.
        hub_config: Configuration of the Hub dataset, e.g. ``20231101.en``.
        train_split: Split of the Hub dataset to train on.
        val_split: Split of the Hub dataset to validate on when ``val`` is None; None takes ``val_percent`` instead.
        **kwargs: See TextDataModule.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder that cannot be read, or a ``val_percent`` outside 0 to 100.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        val_percent: float = 5.0,
        hub_config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_percent(val_percent)
        self.name = (Path(train).expanduser().name if is_path(train) else train.replace("/", "--")) or "text"
        self.train_source, self.val_source, self.val_percent = train, val, val_percent
        self.hub_config, self.train_split, self.val_split = hub_config, train_split, val_split
        for field, source in (("train", train), ("val", val)):
            if source is not None and is_path(source):
                source_files(field, source)

    def inputs(self) -> list[Path]:
        """See ``PreparedData.inputs``."""
        sources = (self.train_source, self.val_source)
        return [Path(s).expanduser() for s in sources if s is not None and is_path(s)] + super().inputs()

    def source_key(self) -> Any:
        """Path, size and time of change of every file, or name and splits of the Hub dataset."""
        key: dict[str, Any] = {field: self._identity(field, source, split) for field, source, split in self._parts()}
        return key | {"val_percent": None if "val" in key else self.val_percent}

    def documents(self) -> Iterator[tuple[str, str]]:
        """Documents of the validation source, then of the training source; or of one source, divided by hash."""
        for field, source, split in self._parts():
            divide = field == "train" and self._divides()
            for text in self._read(field, source, split):
                if not text.strip():
                    continue
                yield "val" if divide and in_validation(text_digest(text), self.val_percent) else field, text

    def _divides(self) -> bool:
        return self.val_source is None and self.val_split is None

    def _parts(self) -> Iterator[tuple[str, str, str]]:
        """Field, source and Hub split of what is to be read; validation first."""
        if not self._divides():
            yield "val", self.val_source or self.train_source, self.val_split or self.train_split
        yield "train", self.train_source, self.train_split

    def _identity(self, field: str, source: str, split: str) -> Any:
        if not is_path(source):
            return [source, self.hub_config, split]
        return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in source_files(field, source)]

    def _read(self, field: str, source: str, split: str) -> Iterator[str]:
        if not is_path(source):
            yield from hub_documents(field, source, self.hub_config, split)
            return
        files = source_files(field, source)
        size = sum(file.stat().st_size for file in files)
        with stage(f"Reading {Path(source).name}", size, "bytes") as done:
            for text, position in read_documents(files):
                yield text
                done(position)


def is_path(source: str) -> bool:
    """Whether a source names a file or folder: it exists, or it cannot be the name of a Hub dataset."""
    path = Path(source).expanduser()
    return (
        path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix.lower() in READERS
    )


def source_files(field: str, source: str) -> list[Path]:
    """The files of a source that is a path.

    Args:
        field: Argument the source was named in, for errors.
        source: File or folder.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder that cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{field}: no such file or folder: {source}")
    return corpus_files(path)
