"""Instructions with responses, for tuning and calibration: Dolly, Alpaca, GSM8K, and plain text."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_modules.data.instructions import Instruction, Template, recognise
from lightning_modules.data.loading import Samples
from lightning_modules.data.packing import pack_whole
from lightning_modules.data.prepare import Preparation
from lightning_modules.data.prepared import PreparedData
from lightning_modules.data.samples import SampleEncoder, sample_preparation, split_of
from lightning_modules.data.shards import State
from lightning_modules.data.source import Source


class InstructData(PreparedData):
    """Prompts and responses, tokenised once; only the response is learnt.

    Records are recognised by their fields: Dolly (``instruction, context, response``), Alpaca (``instruction, input,
    output``), GSM8K (``question, answer``), or plain text (``text``, and text files), which is all response and is cut
    into several samples where it is long. Samples without a response are left out and counted.

    Batches hold ``input_ids``, ``labels`` and ``attention_mask``, int64[batch, T], padded to the longest row, with
    labels -100 on prompts and padding; and ``sample_id``, int64[batch], a hash of the sample's text. Batches that need
    it (packed ones, and those padded on the left) also hold ``position_ids``, which begin at 0 with every sample and
    every stretch of padding: transformers then lets no token see another sample's, as long as it is given neither
    ``attention_mask`` nor a cache (eager, sdpa and flex attention; flash attention only at batch_size 1).

    Args:
        train: File (.json, .jsonl, .txt), folder, or name of a Hub dataset. Only a named Hub dataset is downloaded.
        tokenizer: Folder or Hub name of the model's tokenizer.
        val: The same as ``train`` for validation. None takes ``val_percent`` of the training samples.
        val_percent: Share of the samples used for validation when ``val`` is None, chosen by a hash of their prompt.
        hub_config: Configuration of the Hub dataset.
        train_split: Split of the Hub dataset to train on.
        val_split: Split of the Hub dataset to validate on when ``val`` is None; None takes ``val_percent`` instead.
        template: "alpaca" writes Stanford Alpaca's prompt, "chat" the tokenizer's own chat template.
        max_length: Most tokens of a sample. Longer ones lose the beginning of their context, then the end of the
            response (of which half of ``max_length`` stays), then the beginning of the prompt.
        batch_size: Samples (or packed rows) in a batch of one rank.
        packing: Put several samples into one row of ``max_length``, isolated from each other, instead of padding each.
        padding_side: Where shorter rows are padded.
        cache_dir: Folder for prepared data. Default: $PARE_CACHE, or ~/.cache/pare.
        num_workers: Loader processes of a rank. 0 loads in the training process, which is fast enough.
        max_train_samples: Use only the first so many training samples.
        max_val_samples: Use only the first so many validation samples.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an argument out of range, or a file or folder that cannot be read.
    """

    length_field = "max_length"
    rows_are = "samples"
    row_format = "numpy"

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        val_percent: float = 5.0,
        hub_config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        template: Template = "alpaca",
        max_length: int = 512,
        batch_size: int = 8,
        packing: bool = False,
        padding_side: Literal["left", "right"] = "right",
        cache_dir: str | None = None,
        num_workers: int = 0,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
    ) -> None:
        super().__init__(max_length, batch_size, tokenizer, cache_dir, num_workers, max_train_samples, max_val_samples)
        self.source = Source(train, val, val_percent, hub_config, train_split, val_split)
        self.name = self.source.name
        self.packing, self.padding_side, self.template = packing, padding_side, template

    def inputs(self) -> list[Path]:
        """See ``OrderedData.inputs``."""
        return self.source.inputs() + super().inputs()

    def source_key(self) -> Any:
        """See ``Source.key``."""
        return self.source.key()

    def instructions(self) -> Iterator[tuple[str, Instruction, str]]:
        """Split, sample, and how to call it in an error; always in the same order, validation first.

        Raises:
            ValueError: a record of no known format.
        """
        source = self.source
        for field, record, where in source.records():
            sample = recognise(record, where)
            yield split_of(sample, source.val_percent) if source.divides else field, sample, where

    @cached_property
    def _encoder(self) -> SampleEncoder:
        assert self._source_tokenizer is not None  # ``tokenizer`` is required
        return SampleEncoder(self._source_tokenizer, self.template, self.block_size)

    def _encoding(self) -> Any:
        return ["instruct", *self._encoder.identity()]

    def _preparation(self) -> Preparation:
        return sample_preparation(self.instructions, self._encoder, self._limits)

    def _open(self, folder: Path) -> None:
        self.tokenizer = self._encoder.tokenizer
        self._samples: dict[str, Samples] = {}
        pad = self.tokenizer.pad_token_id
        for split, samples in (("train", self.train), ("val", self.val)):
            groups = pack_whole(_lengths(samples).tolist(), self.block_size) if self.packing else None
            end = self.tokenizer.eos_token_id
            self._samples[split] = Samples(samples, groups, end if pad is None else pad, self.padding_side)

    def _dataset(self, split: str) -> Samples:
        return self._samples[split]

    def _row_lengths(self) -> NDArray[np.int64] | None:
        return None if self.packing else _lengths(self.train)

    @property
    def perplexity_on(self) -> str:
        """See ``OrderedData.perplexity_on``."""
        begins = self._encoder.begins
        return (
            f"responses in samples of at most {self.block_size} tokens, {self.template}, {'' if begins else 'no '}BOS"
        )

    def describe(self) -> dict[str, Any]:
        """The data in numbers, for records: samples and tokens of both splits, what was left out, tokenizer, hash."""
        return {
            "name": self.name,
            "prepared": {split: _prepared(state) for split, state in self._states.items()},
            "samples": {"val": len(self.val), "train": len(self.train)},
            "rows": {split: len(rows) for split, rows in self._samples.items()},
            "template": self.template,
            "packing": self.packing,
            "padding_side": self.padding_side,
            "max_length": self.block_size,
            "perplexity_on": self.perplexity_on,
            "tokenizer": self._tokenizer_name,
            "vocab_size": len(self.tokenizer),
            "hash": self._hash,
        }


def _prepared(state: State) -> dict[str, int]:
    """What was tokenised and what was left out of a split."""
    return {**state.counts, **{name: count for name, count in state.source.items() if name != "rows"}}


def _lengths(samples: Any) -> NDArray[np.int64]:
    return np.asarray(samples["length"][:], np.int64)
