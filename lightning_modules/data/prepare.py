"""The stages of data preparation: documents -> rows -> tokenizer -> blocks of token ids, each a folder of the cache."""

import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.files import replacing, write_text
from common.progress import stage
from lightning_modules.data.packing import pack_blocks
from lightning_modules.data.readers import text_digest
from lightning_modules.data.tokenizer import Encoder, single_threaded, train_bpe

FORMAT = 1
"""Part of every cache key: raise it when the meaning of a cache folder changes."""

SPLITS = ("val", "train")

_CHUNK = 1 << 20  # characters read, tokenised and written at a time: bounds the memory, does not change the result
_TRAIN_BPE = 32 << 20  # characters a tokenizer is trained on, spread over the corpus


@dataclass
class Split:
    """What was prepared for one split."""

    documents: int
    tokens: int
    blocks: int
    dropped_tokens: int


def prepare(
    folder: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    block_size: int,
    threads: int,
) -> None:
    """Carry out the stages that are not finished yet. The caller holds the lock of ``folder``.

    Args:
        folder: Cache folder of this preparation.
        documents: Pairs of split and text; read only if the rows are not there yet.
        tokenizer: The tokenizer to use, or None to train one on the training rows.
        vocab_size: Vocabulary of a tokenizer trained here.
        block_size: Tokens in a block.
        threads: Threads that tokenise.

    Raises:
        ValueError: a split has no documents, or too little text for one block.
    """
    rows, trained = folder / "rows", folder / "tokenizer"
    if not rows.exists() and not all((folder / split).exists() for split in SPLITS):
        _write_rows(rows, documents)
    if tokenizer is None:
        if not trained.exists():
            _train_tokenizer(trained, rows, vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(str(trained), local_files_only=True)
    for split in SPLITS:
        if not (folder / split).exists():
            _write_blocks(folder / split, rows, split, Encoder(tokenizer), block_size, threads)
    summary = {split: json.loads((folder / split / "counts.json").read_text()) for split in SPLITS}
    write_text(folder / "summary.json", json.dumps(summary))
    shutil.rmtree(rows, ignore_errors=True)


def finished(folder: Path) -> bool:
    """Whether all stages are complete."""
    return (folder / "summary.json").exists()


def open_blocks(folder: Path, split: str) -> Dataset:
    """The blocks of a split, memory-mapped: rows of ``input_ids[block_size]``, int32 on disk, int64 when read."""
    return Dataset.from_file(str(folder / split / "blocks.arrow")).with_format("torch")


def summary(folder: Path) -> dict[str, Split]:
    """What was prepared, by split."""
    return {split: Split(**counts) for split, counts in json.loads((folder / "summary.json").read_text()).items()}


def _write_rows(final: Path, documents: Iterable[tuple[str, str]]) -> None:
    counts, validation = Counter[str](), set[bytes]()
    with replacing(final, "cache") as folder:
        writers = {split: _RowWriter(folder / f"{split}.arrow") for split in SPLITS}
        for split, text in documents:
            digest = text_digest(text)
            if split == "val":
                validation.add(digest)
            elif digest in validation:
                counts["overlap"] += 1
                continue
            counts[split] += 1
            writers[split].add(text)
        for writer in writers.values():
            writer.close()
        for split in SPLITS:
            if not counts[split]:
                also = " that is not also validation text" if split == "train" and counts["overlap"] else ""
                raise ValueError(f"{split}: the corpus has no document{also}; give more text or another split")
        (folder / "counts.json").write_text(json.dumps(counts))
    if counts["overlap"]:
        rank_zero_info(f"Left out {counts['overlap']:,} training documents that are also validation documents")


class _RowWriter:
    """Documents in an Arrow stream, in batches of about ``_CHUNK`` characters."""

    schema = pa.schema([("text", pa.large_string())])

    def __init__(self, path: Path) -> None:
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        self.texts: list[str] = []
        self.size = 0

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.size += len(text)
        if self.size >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        self.stream.write_batch(pa.record_batch([pa.array(self.texts, pa.large_string())], schema=self.schema))
        self.texts, self.size = [], 0

    def close(self) -> None:
        if self.texts:
            self._flush()
        self.stream.close()
        self.file.close()


def _read_rows(path: Path, skip: int = 1) -> Iterator[list[str]]:
    # Read, not mapped: mapped pages would stay in this process's memory figure until the system wants them back.
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as stream:
        for number, batch in enumerate(stream):
            if number % skip == 0:
                yield batch.column(0).to_pylist()


def _train_tokenizer(final: Path, rows: Path, vocab_size: int) -> None:
    path = rows / "train.arrow"
    size = path.stat().st_size
    skip = -(-size // _TRAIN_BPE)

    with (
        replacing(final, "cache") as folder,
        stage(f"Training a tokenizer of {vocab_size:,} tokens", size // skip, "bytes") as done,
    ):

        def texts() -> Iterator[list[str]]:
            read = 0
            for batch in _read_rows(path, skip):
                yield batch
                read += sum(map(len, batch))
                done(read)

        trained = train_bpe(texts(), vocab_size)
        trained.save_pretrained(str(folder))
    if len(trained) < vocab_size:
        rank_zero_info(f"The corpus yields only {len(trained):,} different tokens (vocab_size={vocab_size:,})")


def _write_blocks(final: Path, rows: Path, split: str, encoder: Encoder, block_size: int, threads: int) -> None:
    documents = json.loads((rows / "counts.json").read_text())[split]
    schema = pa.schema([("input_ids", pa.list_(pa.int32(), block_size))])
    rest, tokens, blocks, read = np.empty(0, np.int32), 0, 0, 0
    with replacing(final, "cache") as folder:
        with (
            stage(f"Tokenising {split}", documents, "documents") as done,
            pa.OSFile(str(folder / "blocks.arrow"), "wb") as file,
            pa.ipc.new_stream(file, schema) as stream,
        ):
            for count, ids in _encode(_read_rows(rows / f"{split}.arrow"), encoder, threads):
                packed, rest = pack_blocks([rest, ids], block_size)
                column = pa.FixedSizeListArray.from_arrays(pa.array(packed.reshape(-1)), block_size)
                stream.write_batch(pa.record_batch([column], schema=schema))
                tokens, blocks, read = tokens + len(ids), blocks + len(packed), read + count
                done(read)
        if blocks == 0:
            raise ValueError(
                f"{split}: the corpus has {tokens:,} tokens, less than one block of {block_size:,}; "
                f"set block_size to at most {tokens:,} or give more text"
            )
        (folder / "counts.json").write_text(json.dumps(asdict(Split(documents, tokens, blocks, len(rest)))))
    rank_zero_info(f"{split}: {blocks:,} blocks of {block_size:,} tokens, {len(rest)} tokens at the end dropped")


def _encode(chunks: Iterable[list[str]], encoder: Encoder, threads: int) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Number of documents and token ids of each chunk, in order, a few chunks ahead of the reader."""
    waiting: deque[tuple[int, Future[NDArray[np.int32]]]] = deque()
    with single_threaded(), ThreadPoolExecutor(threads) as pool:
        for chunk in chunks:
            waiting.append((len(chunk), pool.submit(encoder, chunk)))
            if len(waiting) > threads:
                count, ids = waiting.popleft()
                yield count, ids.result()
        while waiting:
            count, ids = waiting.popleft()
            yield count, ids.result()
