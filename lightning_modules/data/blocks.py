"""Documents as blocks of token ids of equal length, and the tokenizer that may be trained for them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.files import replacing
from common.progress import stage
from lightning_modules.data.packing import pack_blocks
from lightning_modules.data.prepare import TOKENIZER, Preparation
from lightning_modules.data.readers import text_digest
from lightning_modules.data.rows import Row, Rows
from lightning_modules.data.shards import Recipe, State
from lightning_modules.data.tokenizer import Encoder, train_bpe

_TRAIN_BPE = 32 << 20  # bytes of text a tokenizer is trained on, spread over the corpus


class BlockRecipe(Recipe):
    """Documents end to end, an end-of-text token after each, cut into blocks.

    Args:
        encoder: Makes token ids.
        block_size: Tokens in a block.
    """

    def __init__(self, encoder: Encoder, block_size: int) -> None:
        self.encoder, self.block_size = encoder, block_size
        self.schema = pa.schema([("input_ids", pa.list_(pa.int32(), block_size))])

    def encode(self, rows: list[Row]) -> NDArray[np.int32]:
        """See ``Recipe``."""
        return self.encoder([str(text) for (text,) in rows])

    def pack(self, encoded: NDArray[np.int32], state: State) -> list[pa.Array]:
        """See ``Recipe``."""
        blocks, rest = pack_blocks([np.asarray(state.rest, np.int32), encoded], self.block_size)
        state.rest = rest.tolist()
        state.count({"tokens": len(encoded)})
        return [pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), self.block_size)]

    def too_little(self, state: State) -> str:
        """See ``Recipe``."""
        tokens = state.counts["tokens"]
        return (
            f"the corpus has {tokens:,} tokens, less than one block of {self.block_size:,}; set block_size to at most "
            f"{tokens:,} or give more text"
        )


def block_preparation(
    documents: Callable[[], Iterable[tuple[str, str]]],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    block_size: int,
    limits: dict[str, int | None],
    threads: int,
) -> Preparation:
    """How documents are prepared.

    Args:
        documents: Gives pairs of split and text.
        tokenizer: The tokenizer to use, or None to train one on the training text.
        vocab_size: Vocabulary of a tokenizer trained here.
        block_size: Tokens in a block.
        limits: Blocks that are wanted of each split; None for all.
        threads: Threads that tokenise.
    """

    def recipe(folder: Path, rows: Callable[[], Rows]) -> BlockRecipe:
        trained = folder / TOKENIZER
        if tokenizer is None and not trained.exists():
            _train_tokenizer(trained, rows(), vocab_size)
        used = tokenizer or AutoTokenizer.from_pretrained(str(trained), local_files_only=True)
        return BlockRecipe(Encoder(used), block_size)

    return Preparation(("document",), lambda left_out: _distinct(documents(), left_out), recipe, limits, threads)


def _distinct(documents: Iterable[tuple[str, str]], left_out: dict[str, Counter[str]]) -> Iterator[tuple[str, Row]]:
    """Without the training documents that were met as validation documents."""
    validation = set[bytes]()
    for split, text in documents:
        digest = text_digest(text)
        if split == "val":
            validation.add(digest)
        elif digest in validation:
            left_out["train"]["also_in_validation"] += 1
            continue
        yield split, (text,)


def _train_tokenizer(final: Path, rows: Rows, vocab_size: int) -> None:
    size = rows.path.stat().st_size
    step = -(-size // _TRAIN_BPE)
    with (
        replacing(final, "cache") as folder,
        stage(f"Training a tokenizer of {vocab_size:,} tokens", size // step, "bytes") as done,
    ):

        def texts() -> Iterator[list[str]]:
            read = 0
            for chunk in rows.chunks(step=step):
                batch = [str(text) for (text,) in chunk]
                yield batch
                read += sum(map(len, batch))
                done(read)

        trained = train_bpe(texts(), vocab_size)
        trained.save_pretrained(str(folder))
    if len(trained) < vocab_size:
        rank_zero_info(f"The corpus yields only {len(trained):,} different tokens (vocab_size={vocab_size:,})")
