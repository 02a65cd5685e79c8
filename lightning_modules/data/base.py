"""What all text DataModules share: documents tokenised, packed into blocks, and read as they are needed."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lightning_modules.data.blocks import block_preparation
from lightning_modules.data.loading import Batches, Blocks, Windows
from lightning_modules.data.prepare import TOKENIZER, Preparation
from lightning_modules.data.prepared import PreparedData
from lightning_modules.data.repeats import Repeats
from lightning_modules.data.tokenizer import SMALLEST_VOCAB, Encoder


class TextDataModule(PreparedData):
    """Documents, tokenised once, packed into blocks of equal length and read from disk as they are needed.

    Batches are ``{"input_ids": int64[batch, block], "labels": int64[batch, block]}``; the model shifts the labels.
    Documents follow each other with an end-of-text token between them and are cut wherever a block ends. In the last
    validation batch of a rank, rows that only fill up have all labels -100.

    After ``setup()``: ``tokenizer``; ``train`` and ``val`` (memory-mapped datasets of ``input_ids``); ``describe()``.

    Args:
        block_size: Tokens in a block.
        batch_size: Blocks in a batch of one rank.
        tokenizer: Folder or Hub name of a tokenizer. None trains a byte-level BPE on the training text.
        vocab_size: Size of the vocabulary of a tokenizer trained here.
        cache_dir: Folder for prepared data. Default: $PARE_CACHE, or ~/.cache/pare.
        num_proc: Processors to use while preparing.
        num_workers: Loader processes of a rank. 0 loads in the training process, which is fast enough.
        max_train_blocks: Use only the first so many training blocks; the rest of the text is read, but not tokenised.
        max_val_blocks: The same for validation.
        val_stride: Validate on overlapping windows of ``block_size`` tokens that begin this many tokens apart; a token
            is predicted once, from more text before it. None validates on the blocks as they are.
        repeats: Share of the training blocks, from 0 to 1, that end with a passage of theirs over and over (see
            ``Repeats``): teaches small models to copy from what they have read.

    Raises:
        ValueError: an argument that must be positive is not.
    """

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
        val_stride: int | None = None,
        repeats: float = 0.0,
    ) -> None:
        super().__init__(block_size, batch_size, tokenizer, cache_dir, num_workers, max_train_blocks, max_val_blocks)
        if num_proc < 1:
            raise ValueError(f"num_proc must be at least 1, got {num_proc}")
        if val_stride is not None and not 1 <= val_stride <= block_size:
            raise ValueError(f"val_stride must lie between 1 and block_size {block_size}, got {val_stride}")
        if not 0 <= repeats <= 1:
            raise ValueError(f"repeats must lie between 0 and 1, got {repeats}")
        self.val_stride, self.repeats = val_stride, repeats
        if tokenizer is None and vocab_size < SMALLEST_VOCAB:
            raise ValueError(f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes, end of text), got {vocab_size}")
        self._vocab_size, self._num_proc = vocab_size, num_proc

    @abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """Pairs of split (``"train"`` or ``"val"``) and text, always in the same order.

        Equal texts must get the same split, or all validation documents must come first: a training document seen
        before as a validation document is left out.
        """

    def _preparation(self) -> Preparation:
        source, limits = self._source_tokenizer, self._limits
        return block_preparation(self.documents, source, self._vocab_size, self.block_size, limits, self._num_proc)

    def _open(self, folder: Path) -> None:
        self.tokenizer = self._source_tokenizer or AutoTokenizer.from_pretrained(
            str(folder / TOKENIZER), local_files_only=True
        )

    def _dataset(self, split: str) -> Batches:
        if split == "val" and self.val_stride is not None:
            return Windows(self.val, self.block_size, self.val_stride)
        blocks = Blocks(self.train if split == "train" else self.val)
        return Repeats(blocks, self.repeats) if split == "train" and self.repeats else blocks

    def state_dict(self) -> dict[str, Any]:
        """See ``OrderedData.state_dict``; blocks in which passages come again are other data."""
        state = super().state_dict()
        return state | ({"data": f"{state['data']}, repeats {self.repeats:g}"} if self.repeats else {})

    @property
    def perplexity_on(self) -> str:
        """See ``OrderedData.perplexity_on``."""
        if self.val_stride is None:
            return f"blocks of {self.block_size} tokens, no overlap, no BOS"
        return f"windows of {self.block_size} tokens every {self.val_stride}, no BOS"

    def describe(self) -> dict[str, Any]:
        """The data in numbers, for records: documents, tokens and blocks of both splits, tokenizer, hash.

        Documents are those of the whole source; tokens those of the blocks that are used, which may be fewer. Tokens
        are dropped only at the end of a split that is used whole.
        """
        used = {"val": len(self.val), "train": len(self.train)}
        rests = {split: s.rest if s.complete and used[split] == s.rows else [] for split, s in self._states.items()}
        return {
            "name": self.name,
            "documents": {split: state.source["rows"] for split, state in self._states.items()},
            "tokens": {split: blocks * self.block_size + len(rests[split]) for split, blocks in used.items()},
            "dropped_tokens": {split: len(rest) for split, rest in rests.items()},
            "blocks": used,
            "block_size": self.block_size,
            "repeats": self.repeats,
            "perplexity_on": self.perplexity_on,
            "tokenizer": self._tokenizer_name,
            "vocab_size": len(self.tokenizer),
            "hash": self._hash,
        }

    def _encoding(self) -> Any:
        source = self._source_tokenizer
        return ["bpe", self._vocab_size] if source is None else Encoder(source).identity()
