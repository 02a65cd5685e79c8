"""What all DataModules share: a prepared cache, loaders, and the position in the sample order."""

from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from common.manifest import DamagedError, check_manifest
from common.processes import check_temporary_folder
from common.randomness import run_seed
from lightning_modules.data.cache import alone, cache_root, explain_unwritable, remove_leftovers
from lightning_modules.data.loading import Blocks, ResumableLoader, Samples, Windows, as_is
from lightning_modules.data.prepare import Preparation, finished, prepare
from lightning_modules.data.repeats import Repeats
from lightning_modules.data.sampler import FixedOrderSampler, Position, ResumableSampler
from lightning_modules.data.tokenizer import fingerprint, load_tokenizer


class _Start(NamedTuple):
    """Position when this process began or was resumed, and what Lightning's count of batches was then."""

    seed: int
    samples: int = 0
    batches: int = 0


class PreparedData(L.LightningDataModule, ABC):
    """Text prepared once, kept in a cache folder, and read from disk in an order that can be continued anywhere.

    ``prepare_data`` runs on the first process of every node (``prepare_data_per_node``, because a cache folder is
    usually local to its node); where nodes share the folder, a lock lets one of them work and the others wait.

    Args:
        length: Tokens in a row, at most.
        batch_size: Rows in a batch of one rank.
        tokenizer: Folder or Hub name of a tokenizer; None where the subclass makes one.
        cache_dir: Folder for prepared data. Default: $PARE_CACHE, or ~/.cache/pare.
        num_workers: Loader processes of a rank. 0 loads in the training process.
    """

    name: str
    """Short name of the data for records and cache folders."""
    length_field = "block_size"
    """What subclasses call ``length``, for errors."""
    rows_are = "blocks"

    def __init__(
        self, length: int, batch_size: int, tokenizer: str | None, cache_dir: str | None, num_workers: int
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if num_workers:
            check_temporary_folder()
        self.block_size, self.batch_size, self.num_workers = length, batch_size, num_workers
        self._tokenizer_source, self._cache_root = tokenizer, cache_root(cache_dir)
        self._start = _Start(run_seed())
        self._limits: dict[str, int | None] = {"train": None, "val": None}
        self.tokenizer: PreTrainedTokenizerBase
        self.train: Dataset
        self.val: Dataset

    def inputs(self) -> list[Path]:
        """Files and folders that are read: nothing may be written over them."""
        folder = Path(self._tokenizer_source or "").expanduser()
        return [folder] if self._tokenizer_source and folder.exists() else []

    @property
    @abstractmethod
    def perplexity_on(self) -> str:
        """What a perplexity of the validation split is measured on: lengths, overlap, beginnings; for records."""

    @abstractmethod
    def source_key(self) -> Any:
        """What the text depends on, as JSON-able values; another key makes another cache."""

    @abstractmethod
    def _key(self) -> str:
        """Hash of everything that decides the content of the cache."""

    @abstractmethod
    def _preparation(self) -> Preparation:
        """How the cache folder is filled."""

    @abstractmethod
    def _open(self, folder: Path) -> None:
        """Set ``tokenizer``, ``train`` and ``val`` from the finished cache folder."""

    @abstractmethod
    def _dataset(self, split: str) -> Blocks | Windows | Repeats | Samples:
        """Whole batches of a split, by index (see ``Blocks``)."""

    def _row_lengths(self) -> NDArray[np.int64] | None:
        """Length of every training row, where batches are to be of similar lengths."""
        return None

    # ---- the cache --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build the cache, or go on after the last finished stage or shard; check what is finished already.

        Checking reads every file of the cache once, at about a gigabyte a second.

        Raises:
            DamagedError: a file of the cache is not what was written.
            ValueError: input that cannot be used, or a cache folder that cannot be written to. What is finished stays.
            FileNotFoundError: a corpus or tokenizer that is not there.
        """
        folder = self._folder(self._key())
        if self._ready(folder):
            return
        with explain_unwritable(self._cache_root):
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder):
                folder.mkdir(exist_ok=True)
                try:
                    if not self._ready(folder):
                        remove_leftovers(folder)
                        prepare(folder, self._preparation())
                finally:
                    with suppress(OSError):  # not empty: something is finished
                        folder.rmdir()

    def _ready(self, folder: Path, contents: bool = True) -> bool:
        """Whether the cache holds what is wanted, and as it was written."""
        try:
            return check_manifest(folder, contents=contents) is not None and finished(folder, self._limits)
        except DamagedError as error:
            reason = str(error).split(";")[0]
            raise DamagedError(f"{reason}; delete {folder}, and the data are prepared again") from error

    def setup(self, stage: str) -> None:
        """Open the cache; reads no text.

        Raises:
            DamagedError: a file of the cache is missing or cut short.
            FileNotFoundError: ``prepare_data`` has not finished.
        """
        key = self._key()
        folder = self._folder(key)
        if not self._ready(folder, contents=False):
            raise FileNotFoundError(
                f"{self.name}: no prepared data in {folder}; call prepare_data() first (in a Trainer: it failed on the "
                "first rank, or the corpus changed meanwhile, or cache_dir is not the same folder for all ranks)"
            )
        self._open(folder)
        self._hash, self._fingerprint = key, fingerprint(self.tokenizer)
        if self._batches_done() == 0:  # a fresh run (one that resumes is told its position after this)
            self._start = _Start(run_seed())

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

    def _folder(self, key: str) -> Path:
        return self._cache_root / f"{self.name}-{key[:16]}"

    @staticmethod
    def _first(rows: Dataset, limit: int | None) -> Dataset:
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    # ---- the loaders ------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches from the present position on.

        Raises:
            ValueError: the training split does not fill one batch for every rank.
        """
        ranks = self._ranks()
        rows = self._dataset("train")
        sampler = ResumableSampler(len(rows), **ranks, position=self.position, lengths=self._row_lengths())
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"train: {len(rows)} {self.rows_are} are fewer than one global batch (batch_size {self.batch_size} on "
                f"{ranks['num_replicas']} ranks); lower batch_size or {self.length_field}, or give more text"
            )
        return ResumableLoader(rows, sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> DataLoader:
        """The whole validation split in fixed order, equally many batches on every rank."""
        rows = self._dataset("val")
        sampler = FixedOrderSampler(len(rows), **self._ranks())
        return DataLoader(rows, sampler=sampler, **self._loading())

    def predict_dataloader(self) -> DataLoader:
        """The training split in fixed order, equally many batches on every rank."""
        rows = self._dataset("train")
        return DataLoader(rows, sampler=FixedOrderSampler(len(rows), **self._ranks()), **self._loading())

    def test_dataloader(self) -> DataLoader:
        """The validation split: a language-modelling corpus has no other held-out text."""
        return self.val_dataloader()

    def calibration(self, count: int, seed: int | None = None) -> list[dict[str, Tensor]]:
        """Rows of the training split to calibrate on, the same on every rank, as batches.

        Args:
            count: How many rows; each is one sample, or one block.
            seed: Draws them; None spreads them evenly over the split.

        Raises:
            ValueError: the training split has fewer.
        """
        rows = self._dataset("train")
        if not 1 <= count <= len(rows):
            raise ValueError(
                f"calibration_blocks is {count}, but the training text has only {len(rows)} {self.rows_are}; lower "
                "calibration_blocks, or give more text"
            )
        if seed is None:
            chosen = [i * len(rows) // count for i in range(count)]
        else:
            chosen = np.random.default_rng(seed).permutation(len(rows))[:count].tolist()
        return [rows.__getitems__(chosen[i : i + self.batch_size]) for i in range(0, count, self.batch_size)]

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": as_is,
        }

    def _ranks(self) -> dict[str, int]:
        # Not world_size: ranks of one tensor-parallel group must see the same samples, and strategies know that.
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return shared or {"num_replicas": 1, "rank": 0}

    # ---- the position -----------------------------------------------------------------------------------------

    def position(self) -> Position:
        """Seed of the sample order, and rows that all ranks together have trained on since the run first started."""
        batches = self._batches_done() - self._start.batches
        samples = self._start.samples + batches * self.batch_size * self._ranks()["num_replicas"]
        return Position(self._start.seed, samples)

    def _batches_done(self) -> int:
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def state_dict(self) -> dict[str, Any]:
        """Position in the sample order, and what it is a position in. Plain values only."""
        return {
            **self.position()._asdict(),
            "batches": self._batches_done(),
            "block_size": self.block_size,
            "data": f"{len(self._dataset('train'))} {self.rows_are} of {self._hash}",
            "tokenizer": self._tokenizer_name,
            "vocab_size": len(self.tokenizer),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved position, whatever the batch size and the number of ranks are now.

        Raises:
            ValueError: the checkpoint was made with another tokenizer, or (while training) another block size.
        """
        now = self.state_dict()
        if state_dict["fingerprint"] != now["fingerprint"]:
            then, here = (
                f"{d['tokenizer']} (vocabulary {d['vocab_size']}, sha {d['fingerprint'][:12]})"
                for d in (state_dict, now)
            )
            raise ValueError(
                f"tokenizer: the checkpoint was made with {then}; this run uses {here}, so token ids would mean other "
                "text; set tokenizer to the checkpoint's, or start without the checkpoint"
            )
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if (then := state_dict["block_size"]) != self.block_size:
            raise ValueError(
                f"{self.length_field}: the checkpoint was trained on {self.rows_are} of {then} tokens, this run has "
                f"{self.block_size}; set {self.length_field} to {then} to continue it"
            )
        if state_dict["data"] != now["data"]:
            rank_zero_warn("The training data differ from the checkpoint's: samples already seen may come again.")
        self._start = _Start(state_dict["seed"], state_dict["samples"], state_dict["batches"])
