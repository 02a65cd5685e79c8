"""What all DataModules share: rows in an order that can be continued anywhere, and their loaders."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from common.processes import check_temporary_folder
from common.randomness import run_seed
from lightning_modules.data.loading import Batches, ResumableLoader, as_is
from lightning_modules.data.sampler import FixedOrderSampler, Position, ResumableSampler
from lightning_modules.data.tokenizer import fingerprint


class _Start(NamedTuple):
    """Position when this process began or was resumed, and what Lightning's count of batches was then."""

    seed: int
    samples: int = 0
    batches: int = 0


class OrderedData(L.LightningDataModule, ABC):
    """Rows of tokens by index, read in an order that is a function of seed and position.

    After ``setup()`` there are ``tokenizer`` and what ``_dataset`` gives.

    Args:
        length: Tokens in a row, at most.
        batch_size: Rows in a batch of one rank.
        num_workers: Loader processes of a rank. 0 loads in the training process.
    """

    name: str
    """Short name of the data for records and cache folders."""
    length_field = "block_size"
    """What subclasses call ``length``, for errors."""
    rows_are = "blocks"

    def __init__(self, length: int, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if num_workers:
            check_temporary_folder()
        self.block_size, self.batch_size, self.num_workers = length, batch_size, num_workers
        self._start = _Start(run_seed())
        self.tokenizer: PreTrainedTokenizerBase

    def inputs(self) -> list[Path]:
        """Files and folders that are read: nothing may be written over them."""
        return []

    @property
    @abstractmethod
    def perplexity_on(self) -> str:
        """What a perplexity of the validation split is measured on: lengths, overlap, beginnings; for records."""

    @property
    @abstractmethod
    def _identity(self) -> str:
        """What stands for the content of all rows; another one is other data."""

    @property
    def _tokenizer_name(self) -> str:
        return f"that of {self.name}"

    @abstractmethod
    def _dataset(self, split: str) -> Batches:
        """The rows of a split, whole batches of which are read by index."""

    def _row_lengths(self) -> NDArray[np.int64] | None:
        """Length of every training row, where batches are to be of similar lengths."""
        return None

    def setup(self, stage: str) -> None:
        """Begin the order; subclasses have their tokenizer by then."""
        self._fingerprint = fingerprint(self.tokenizer)
        if self._batches_done() == 0:  # a fresh run (one that resumes is told its position after this)
            self._start = _Start(run_seed())

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
        """The validation split: there is no other held-out text."""
        return self.val_dataloader()

    def calibration(self, count: int, seed: int | None = None, skip: int = 0) -> list[dict[str, Tensor]]:
        """Rows of the training split to calibrate on, the same on every rank, as batches.

        Args:
            count: How many rows; each is one sample, or one block.
            seed: Draws them; None spreads them evenly over the split.
            skip: How many that the seed draws first are left out, as they are used for something else.

        Raises:
            ValueError: the training split has fewer.
        """
        rows = self._dataset("train")
        if not 1 <= count <= len(rows) - skip:
            others = f", and {skip} others are in use" if skip else ""
            raise ValueError(
                f"calibration_blocks is {count}{others}, but the training text has only {len(rows)} {self.rows_are}; "
                "lower calibration_blocks, or give more text"
            )
        if seed is None:
            chosen = [i * len(rows) // count for i in range(count)]
        else:
            chosen = np.random.default_rng(seed).permutation(len(rows))[skip : skip + count].tolist()
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
            "data": f"{len(self._dataset('train'))} {self.rows_are} of {self._identity}",
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
