"""What DataModules over text share: a cache that is prepared once, and read from disk."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common.manifest import DamagedError, check_manifest
from lightning_modules.data.cache import alone, begin, cache_root, explain_unwritable, remove_leftovers
from lightning_modules.data.ordered import OrderedData
from lightning_modules.data.prepare import FORMAT, Preparation, finished, prepare, summary
from lightning_modules.data.shards import open_shards
from lightning_modules.data.tokenizer import load_tokenizer

_NAME_BYTES = 100  # of a cache folder's name, which has a hash and ".lock" besides; file systems take 255


class PreparedData(OrderedData):
    """Text prepared once, kept in a cache folder, and read from disk in an order that can be continued anywhere.

    ``prepare_data`` runs on the first process of every node (``prepare_data_per_node``, because a cache folder is
    usually local to its node); where nodes share the folder, a lock lets one of them work and the others wait.

    Args:
        length: Tokens in a row, at most.
        batch_size: Rows in a batch of one rank.
        tokenizer: Folder or Hub name of a tokenizer; None where the subclass makes one.
        cache_dir: Folder for prepared data. Default: $PARE_CACHE, or ~/.cache/pare.
        num_workers: Loader processes of a rank. 0 loads in the training process.
        max_train: Use only the first so many training rows.
        max_val: The same for validation.

    Raises:
        ValueError: a length, size or limit that is not positive.
    """

    row_format: Literal["torch", "numpy"] = "torch"
    """What rows are read as."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        tokenizer: str | None,
        cache_dir: str | None,
        num_workers: int,
        max_train: int | None,
        max_val: int | None,
    ) -> None:
        super().__init__(length, batch_size, num_workers)
        limits = {f"max_train_{self.rows_are}": max_train, f"max_val_{self.rows_are}": max_val}
        for field, value in {self.length_field: length, "batch_size": batch_size, **limits}.items():
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        self._tokenizer_source, self._cache_root = tokenizer, cache_root(cache_dir)
        self._limits = {"train": max_train, "val": max_val}
        self.train: Dataset
        self.val: Dataset

    def inputs(self) -> list[Path]:
        """See ``OrderedData.inputs``."""
        folder = Path(self._tokenizer_source or "").expanduser()
        return [folder] if self._tokenizer_source and folder.exists() else []

    @abstractmethod
    def source_key(self) -> Any:
        """What the text depends on, as JSON-able values; another key makes another cache."""

    @abstractmethod
    def _encoding(self) -> Any:
        """What decides the tokens of a text besides the length, as JSON-able values; part of the key, too."""

    @abstractmethod
    def _preparation(self) -> Preparation:
        """How the cache folder is filled."""

    @abstractmethod
    def _open(self, folder: Path) -> None:
        """Set ``tokenizer`` from the finished cache folder, and what is made of ``train`` and ``val``."""

    def prepare_data(self) -> None:
        """Build the cache, or go on after the last finished stage or shard; check what is finished already.

        Checking reads every file of the cache once, several at a time, at about a gigabyte a second each.

        Raises:
            DamagedError: a file of the cache is not what was written.
            ValueError: input that cannot be used, or a cache folder that cannot be written to. What is finished stays.
            FileNotFoundError: a corpus or tokenizer that is not there.
        """
        folder = self._folder(self._key())
        with _remedy(folder):
            if finished(folder, self._limits):
                check_manifest(folder)
                return
            with explain_unwritable(self._cache_root), alone(folder), begin(folder):
                if not finished(folder, self._limits):  # nobody has done it meanwhile
                    remove_leftovers(folder)
                    prepare(folder, self._preparation())

    def setup(self, stage: str) -> None:
        """Open the cache; reads no text.

        Raises:
            DamagedError: a file of the cache is missing or cut short.
            FileNotFoundError: ``prepare_data`` has not finished.
        """
        self._hash = self._key()
        folder = self._folder(self._hash)
        with _remedy(folder):
            if not finished(folder, self._limits):
                raise FileNotFoundError(
                    f"{self.name}: no prepared data in {folder}; call prepare_data() first (in a Trainer: it failed on "
                    "the first rank, or the corpus changed meanwhile, or cache_dir is not the same folder on all ranks)"
                )
        self._states = summary(folder)
        self.train, self.val = (self._rows(folder, split) for split in ("train", "val"))
        self._open(folder)
        super().setup(stage)

    def _rows(self, folder: Path, split: str) -> Dataset:
        rows, limit = open_shards(folder / split).with_format(self.row_format), self._limits[split]
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    @property
    def _identity(self) -> str:
        return self._hash

    @cached_property
    def _source_tokenizer(self) -> PreTrainedTokenizerBase | None:
        return None if self._tokenizer_source is None else load_tokenizer(self._tokenizer_source)

    @property
    def named_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that the argument names, before ``setup`` too; None where one is made from the text."""
        return self._source_tokenizer

    @property
    def _tokenizer_name(self) -> str:
        return self._tokenizer_source or f"byte-level BPE trained on {self.name}"

    def _key(self) -> str:
        """Hash of everything that decides the content of the cache."""
        key = [FORMAT, self.source_key(), self._encoding(), self.block_size]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def _folder(self, key: str) -> Path:
        name = self.name.encode()[:_NAME_BYTES].decode(errors="ignore")  # of many files: the key tells caches apart
        return self._cache_root / f"{name}-{key[:16]}"


@contextmanager
def _remedy(folder: Path) -> Iterator[None]:
    """Say of a damaged cache that it may be deleted as a whole."""
    try:
        yield
    except DamagedError as error:
        reason = str(error).split(";")[0]
        raise DamagedError(f"{reason}; delete {folder}, and the data are prepared again") from error
