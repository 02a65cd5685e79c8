"""Documents or samples of both splits on disk, in chunks that can be read from any place: the input of preparation."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.files import replacing

SPLITS = ("val", "train")

Row = tuple[str | None, ...]

CHUNK = 1 << 20
"""Characters read, tokenised and written at a time: bounds the memory, does not change the result."""


class Rows:
    """The rows of one split.

    Args:
        folder: Written by ``write_rows``.
        split: ``"val"`` or ``"train"``.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.path = folder / f"{split}.arrow"
        found = json.loads((folder / "counts.json").read_text(encoding="utf-8"))[split]
        self.counts: dict[str, int] = found["counts"]
        self._digests: list[str] = found["digests"]

    def __len__(self) -> int:
        """Chunks."""
        return len(self._digests)

    def digest(self, chunks: int) -> str:
        """What stands for the content of the first so many chunks."""
        return self._digests[chunks - 1] if 0 < chunks <= len(self) else ""

    def chunks(self, start: int = 0, step: int = 1) -> Iterator[list[Row]]:
        """The rows of every ``step``-th chunk from ``start`` on."""
        # Read, not mapped: mapped pages would stay in this process's memory figure until the system wants them back.
        with pa.OSFile(str(self.path), "rb") as file, pa.ipc.open_file(file) as batches:
            for number in range(start, batches.num_record_batches, step):
                batch = batches.get_batch(number)
                yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def write_rows(
    final: Path, rows: Iterable[tuple[str, Row]], columns: tuple[str, ...], left_out: dict[str, Counter[str]]
) -> None:
    """Write the rows of both splits as they come.

    Args:
        final: Folder that appears when all rows are there.
        rows: Pairs of split and row.
        columns: Names of what a row holds.
        left_out: Filled while the rows are read: how many were left out of each split, by reason.

    Raises:
        ValueError: a split without rows.
    """
    with replacing(final, "cache") as folder:
        writers = {split: _Writer(folder / f"{split}.arrow", columns) for split in SPLITS}
        for split, row in rows:
            writers[split].add(row)
        for writer in writers.values():
            writer.close()
        for split in SPLITS:
            if not writers[split].rows:
                counts = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in left_out[split].items())
                found = f" ({counts})" if counts else ""
                raise ValueError(f"{split}: no usable {columns[-1]}{found}; give more text, or another split")
        content = {
            split: {"counts": {"rows": writer.rows, **left_out[split]}, "digests": writer.digests}
            for split, writer in writers.items()
        }
        (folder / "counts.json").write_text(json.dumps(content), encoding="utf-8")


class _Writer:
    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.schema = pa.schema([(name, pa.large_string()) for name in columns])
        self.file = pa.OSFile(str(path), "wb")
        self.batches = pa.ipc.new_file(self.file, self.schema)
        self.rows = self.size = 0
        self.digests: list[str] = []
        self._waiting: list[Row] = []
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, row: Row) -> None:
        self._waiting.append(row)
        self.rows += 1
        for part in row:
            self._hash.update(b"\1" if part is None else part.encode() + b"\0")
            self.size += len(part or "")
        if self.size >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        columns: list[Any] = [pa.array(column, pa.large_string()) for column in zip(*self._waiting, strict=True)]
        self.batches.write_batch(pa.record_batch(columns, schema=self.schema))
        self.digests.append(self._hash.hexdigest())
        self._waiting, self.size = [], 0

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self.batches.close()
        self.file.close()
