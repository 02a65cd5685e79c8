"""What all text DataModules share: the prepared cache, the loaders, and the position in the sample order."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_modules.data.cache import cache_root, explain_unwritable, lock_of, locked, remove_leftovers
from lightning_modules.data.loading import Blocks, ResumableLoader, as_is
from lightning_modules.data.prepare import FORMAT, finished, open_blocks, prepare, summary
from lightning_modules.data.sampler import FixedOrderSampler, Position, ResumableSampler
from lightning_modules.data.tokenizer import SMALLEST_VOCAB, Encoder, fingerprint, load_tokenizer
from lightning_modules.randomness import run_seed


class _Start(NamedTuple):
    """Position when this process began or was resumed, and what Lightning's count of batches was then."""

    seed: int
    samples: int = 0
    batches: int = 0


class TextDataModule(L.LightningDataModule, ABC):
    """Documents, tokenised once, packed into blocks of equal length and read from disk as they are needed.

    Batches are ``{"input_ids": int64[batch, block], "labels": int64[batch, block]}``; the model shifts the labels.
    Documents follow each other with an end-of-text token between them and are cut wherever a block ends. In the last
    validation batch of a rank, rows that only fill up have all labels -100.

    After ``setup()``: ``tokenizer``; ``train`` and ``val`` (memory-mapped datasets of ``input_ids``); ``describe()``.

    ``prepare_data`` runs on the first process of every node (``prepare_data_per_node``, because a cache folder is
    usually local to its node); where nodes share the folder, a lock lets one of them work and the others wait.

    Args:
        block_size: Tokens in a block.
        batch_size: Blocks in a batch of one rank.
        tokenizer: Folder or Hub name of a tokenizer. None trains a byte-level BPE on the training text.
        vocab_size: Size of the vocabulary of a tokenizer trained here.
        cache_dir: Folder for prepared data. Default: $PARE_CACHE, or ~/.cache/pare.
        num_proc: Processors to use while preparing.
        num_workers: Loader processes of a rank. 0 loads in the training process, which is fast enough.
        max_train_blocks: Use only the first so many training blocks.
        max_val_blocks: Use only the first so many validation blocks.

    Raises:
        ValueError: an argument that must be positive is not.
    """

    name: str
    """Short name of the data for records and cache folders."""

    def __init__(
        self,
        block_size: int = 512,
        batch_size: int = 8,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        cache_dir: str | None = None,
        num_proc: int = 2,
        num_workers: int = 0,
        max_train_blocks: int | None = None,
        max_val_blocks: int | None = None,
    ) -> None:
        super().__init__()
        limits = {"max_train_blocks": max_train_blocks, "max_val_blocks": max_val_blocks}
        sizes = {"block_size": block_size, "batch_size": batch_size, "num_proc": num_proc}
        for field, value in {**sizes, **limits}.items():
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if tokenizer is None and vocab_size < SMALLEST_VOCAB:
            raise ValueError(f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes, end of text), got {vocab_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.block_size, self.batch_size, self.num_workers = block_size, batch_size, num_workers
        self._tokenizer_source, self._vocab_size = tokenizer, vocab_size
        self._cache_root, self._num_proc, self._limits = cache_root(cache_dir), num_proc, limits
        self._start = _Start(run_seed())
        self.tokenizer: PreTrainedTokenizerBase
        self.train: Dataset
        self.val: Dataset

    @abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """Pairs of split (``"train"`` or ``"val"``) and text, always in the same order.

        Equal texts must get the same split, or all validation documents must come first: a training document seen
        before as a validation document is left out.
        """

    @abstractmethod
    def source_key(self) -> Any:
        """What the documents depend on, as JSON-able values; another key makes another cache."""

    # ---- the cache --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build the cache, or go on with what a killed preparation left; nothing to do where it is finished.

        Raises:
            ValueError: input that cannot be used, or a cache folder that cannot be written to.
            FileNotFoundError: a corpus or tokenizer that is not there.
        """
        folder = self._folder(self._key())
        if finished(folder):
            return
        with explain_unwritable(self._cache_root):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(lock_of(folder)):
                if not finished(folder):
                    folder.mkdir(exist_ok=True)
                    remove_leftovers(folder)
                    self._prepare(folder)

    def _prepare(self, folder: Path) -> None:
        try:
            source = self._source_tokenizer
            prepare(folder, self.documents(), source, self._vocab_size, self.block_size, self._num_proc)
        except Exception:  # bad input or a full disk: going on would fail again, so give the space back
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def setup(self, stage: str) -> None:
        """Open the cache; reads no text.

        Raises:
            FileNotFoundError: ``prepare_data`` has not finished.
        """
        key = self._key()
        folder = self._folder(key)
        if not finished(folder):
            raise FileNotFoundError(
                f"{self.name}: no prepared data in {folder}; call prepare_data() first (in a Trainer: it failed on the "
                "first rank, or the corpus changed meanwhile, or cache_dir is not the same folder for all ranks)"
            )
        self.tokenizer = self._source_tokenizer or AutoTokenizer.from_pretrained(
            str(folder / "tokenizer"), local_files_only=True
        )
        self._hash, self._fingerprint, self._splits = key, fingerprint(self.tokenizer), summary(folder)
        self.train = self._first(open_blocks(folder, "train"), self._limits["max_train_blocks"])
        self.val = self._first(open_blocks(folder, "val"), self._limits["max_val_blocks"])
        if self._batches_done() == 0:  # a fresh run (one that resumes is told its position after this)
            self._start = _Start(run_seed())

    def describe(self) -> dict[str, Any]:
        """The data in numbers, for records: documents, tokens and blocks of both splits, tokenizer, hash."""
        splits = self._splits
        return {
            "name": self.name,
            "documents": {split: counts.documents for split, counts in splits.items()},
            "tokens": {split: counts.tokens for split, counts in splits.items()},
            "dropped_tokens": {split: counts.dropped_tokens for split, counts in splits.items()},
            "blocks": {"val": len(self.val), "train": len(self.train)},
            "block_size": self.block_size,
            "tokenizer": self._tokenizer_name,
            "vocab_size": len(self.tokenizer),
            "hash": self._hash,
        }

    @cached_property
    def _source_tokenizer(self) -> PreTrainedTokenizerBase | None:
        return None if self._tokenizer_source is None else load_tokenizer(self._tokenizer_source)

    @property
    def _tokenizer_name(self) -> str:
        return self._tokenizer_source or f"byte-level BPE trained on {self.name}"

    def _key(self) -> str:
        source = self._source_tokenizer
        identity = ["bpe", self._vocab_size] if source is None else Encoder(source).identity()
        key = [FORMAT, self.source_key(), identity, self.block_size]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def _folder(self, key: str) -> Path:
        return self._cache_root / f"{self.name}-{key[:16]}"

    @staticmethod
    def _first(blocks: Dataset, limit: int | None) -> Dataset:
        return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))

    # ---- the loaders ------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches from the present position on.

        Raises:
            ValueError: the training split does not fill one batch for every rank.
        """
        ranks = self._ranks()
        sampler = ResumableSampler(len(self.train), **ranks, position=self.position)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"train: {len(self.train)} blocks are fewer than one global batch (batch_size {self.batch_size} on "
                f"{ranks['num_replicas']} ranks); lower batch_size or block_size, or give more text"
            )
        return ResumableLoader(Blocks(self.train), sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> DataLoader:
        """The whole validation split in fixed order, equally many batches on every rank."""
        sampler = FixedOrderSampler(len(self.val), **self._ranks())
        return DataLoader(Blocks(self.val), sampler=sampler, **self._loading())

    def predict_dataloader(self) -> DataLoader:
        """The training split in fixed order, equally many batches on every rank."""
        sampler = FixedOrderSampler(len(self.train), **self._ranks())
        return DataLoader(Blocks(self.train), sampler=sampler, **self._loading())

    def test_dataloader(self) -> DataLoader:
        """The validation split: a language-modelling corpus has no other held-out text."""
        return self.val_dataloader()

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
        """Seed of the sample order, and blocks that all ranks together have trained on since the run first started."""
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
            "data": f"{len(self.train)} blocks of {self._hash}",
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
        if state_dict["block_size"] != self.block_size:
            raise ValueError(
                f"block_size: the checkpoint was trained on blocks of {state_dict['block_size']} tokens, this run has "
                f"{self.block_size}; set block_size to {state_dict['block_size']} to continue it"
            )
        if state_dict["data"] != now["data"]:
            rank_zero_warn("The training data differ from the checkpoint's: samples already seen may come again.")
        self._start = _Start(state_dict["seed"], state_dict["samples"], state_dict["batches"])
