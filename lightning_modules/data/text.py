"""The user's own text: files, folders, or a dataset of the Hugging Face Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_modules.data.base import TextDataModule
from lightning_modules.data.instructions import plain_text
from lightning_modules.data.readers import in_validation, text_digest
from lightning_modules.data.source import Source


class TextCorpus(TextDataModule):
    """Text from JSON arrays, JSON lines, plain text files, folders of these, or a Hub dataset.

    JSON records look like ``{"id": ..., "title": ..., "text": ...}``, of which only the text is required; the title
    is put above the text. Records of instructions (see ``InstructData``) are documents, too: question, context and
    response below each other. A plain text file is one document, a long one several of about 16,000 characters.
    Validation documents never also appear in the training split. A folder is read with all folders below it: links are
    followed, every file counts once, and hidden names (``.x``) are passed over; what is left out is said.

    Several sources take turns, so that each gives as much text as the others, until one of them ends. So whatever is
    drawn of the blocks, as for calibration, is drawn of all sources.

    Args:
        train: File (.json, .jsonl, .txt), folder, or name of a Hub dataset; or a list of these. Only a named Hub
            dataset is downloaded.
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
        train: list[str] | str,
        val: list[str] | str | None = None,
        val_percent: float = 5.0,
        hub_config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = Source(train, val, val_percent, hub_config, train_split, val_split)
        self.name = self.source.name

    def inputs(self) -> list[Path]:
        """See ``OrderedData.inputs``."""
        return self.source.inputs() + super().inputs()

    def source_key(self) -> Any:
        """See ``Source.key``."""
        return self.source.key()

    def documents(self) -> Iterator[tuple[str, str]]:
        """Documents of the validation source, then of the training source; or of one source, divided by hash."""
        source = self.source
        for field, record, where in source.records():
            text = plain_text(record, where)
            if text.strip():
                yield "val" if source.divides and in_validation(text_digest(text), source.val_percent) else field, text
