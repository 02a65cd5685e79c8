"""Tokenised rows on disk, in shards: each is there completely or not at all, and says how to go on after it.

A preparation that is killed, or that wanted only the first rows, is continued after its last shard; what comes out is
the same, byte for byte, as if it had never stopped.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from common.files import replacing_file, write_text
from common.manifest import DamagedError, hashes
from common.progress import stage
from lightning_modules.data.rows import Row, Rows
from lightning_modules.data.tokenizer import single_threaded

SHARD = 32
"""Chunks of text in a shard: about 30 MB, of which a killed preparation loses one at most."""


@dataclass
class State:
    """How far a split is prepared; written beside every shard."""

    chunks: int = 0
    """Chunks of the source that are tokenised."""
    digest: str = ""
    """What stands for their content."""
    rows: int = 0
    """Rows of all shards so far."""
    rest: list[int] = field(default_factory=list)
    """Tokens at the end that do not fill a row yet."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the recipe counts."""
    source: dict[str, int] = field(default_factory=dict)
    """Rows of the whole source, and what was left out of it."""
    complete: bool = False
    file: dict[str, Any] = field(default_factory=dict)
    """Bytes and SHA-256 of the shard."""

    def enough(self, limit: int | None) -> bool:
        """Whether the first ``limit`` rows (None: all) are there."""
        return self.complete or (limit is not None and self.rows >= limit)

    def count(self, more: dict[str, int]) -> None:
        """Add to the counts."""
        for name, number in more.items():
            self.counts[name] = self.counts.get(name, 0) + number


class Recipe(ABC):
    """How rows of text become rows of tokens."""

    schema: pa.Schema

    @abstractmethod
    def encode(self, rows: list[Row]) -> Any:
        """The slow part, which depends on nothing but the rows; runs in several threads."""

    @abstractmethod
    def pack(self, encoded: Any, state: State) -> list[pa.Array]:
        """Columns of the next rows, in order; notes in ``state`` what is counted and left over."""

    @abstractmethod
    def too_little(self, state: State) -> str:
        """What to say of a split whose text does not fill one row."""


def write_shards(folder: Path, rows: Rows, recipe: Recipe, limit: int | None, threads: int, title: str) -> State:
    """Tokenise a split as far as it is wanted, after what is there already.

    Args:
        folder: Of the split's shards. Whoever calls holds the lock of the cache.
        rows: The text.
        recipe: What becomes of it.
        limit: Rows of tokens that are wanted; None for all.
        threads: Threads that tokenise.
        title: For the progress.

    Returns:
        How far the split is prepared now.
    """
    state = last_state(folder)
    if state.enough(limit):
        return state
    folder.mkdir(exist_ok=True)
    state.source = rows.counts
    with (
        stage(title, len(rows), "chunks of text", start=state.chunks) as done,
        single_threaded(),
        ThreadPoolExecutor(threads) as pool,
    ):
        encoded = _ahead(pool, recipe.encode, rows.chunks(state.chunks), threads)
        while not state.enough(limit):
            name = f"{len(_states(folder)):05}"
            with (
                replacing_file(folder / f"{name}.arrow") as partial,
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_stream(file, recipe.schema) as stream,
            ):
                for found in encoded:
                    batch = pa.record_batch(recipe.pack(found, state), schema=recipe.schema)
                    stream.write_batch(batch)
                    state.chunks, state.rows = state.chunks + 1, state.rows + batch.num_rows
                    state.complete = state.chunks == len(rows)
                    done(state.chunks)
                    if state.chunks % SHARD == 0 or state.enough(limit):
                        break
            state.digest = rows.digest(state.chunks)
            state.file = hashes(folder, [f"{name}.arrow"])[f"{name}.arrow"]
            content = asdict(state)
            write_text(folder / f"{name}.json", json.dumps(content | {"sha256": _digest(content)}))
    return state


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[list[Row]], Any], chunks: Iterable[list[Row]], threads: int
) -> Iterator[Any]:
    """Results in order, a few chunks ahead of the reader."""
    waiting: deque[Future[Any]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(work, chunk))
        if len(waiting) > threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def last_state(folder: Path) -> State:
    """How far a split is prepared.

    Raises:
        DamagedError: the file that says it is damaged.
    """
    states = _states(folder)
    return read_state(states[-1]) if states else State()


def read_state(path: Path) -> State:
    """How far a split was prepared when a shard was finished.

    Raises:
        DamagedError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") == _digest(content):
            return State(**content)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise DamagedError(f"{path} is damaged; delete {path.parent}: it is prepared again")


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.json"))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every shard, as noted when it was written."""
    return {f"{path.stem}.arrow": read_state(path).file for path in _states(folder)}


def open_shards(folder: Path) -> Dataset:
    """The rows of a split, memory-mapped."""
    shards = [Dataset.from_file(str(folder / name)) for name in shard_files(folder)]
    return shards[0] if len(shards) == 1 else concatenate_datasets(shards)
