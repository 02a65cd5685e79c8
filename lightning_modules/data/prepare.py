"""The stages of data preparation: rows of text -> tokenizer -> shards of token ids, each kept when it is finished."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common.manifest import MARKER, hashes, write_manifest
from lightning_modules.data.rows import SPLITS, Row, Rows, write_rows
from lightning_modules.data.shards import Recipe, State, last_state, shard_files, write_shards


class Preparation(NamedTuple):
    """What is to be prepared."""

    columns: tuple[str, ...]
    """Names of what a row of text holds."""
    rows: Callable[[dict[str, Counter[str]]], Iterable[tuple[str, Row]]]
    """Reads pairs of split and row; notes what it leaves out of each split."""
    recipe: Callable[[Path, Callable[[], Rows]], Recipe]
    """How rows become tokens, given the cache folder and the training rows."""
    limits: dict[str, int | None]
    """Rows of tokens that are wanted of each split; None for all."""
    threads: int = 1


def prepare(folder: Path, wanted: Preparation) -> None:
    """Carry out what is not finished yet. Whoever calls holds the lock of ``folder``.

    Raises:
        ValueError: a split has no text, or too little for one row of tokens.
    """
    rows = folder / "rows"
    pending = not all(state.enough(wanted.limits[split]) for split, state in summary(folder).items())
    if pending and not rows.exists():
        left_out = {split: Counter[str]() for split in SPLITS}
        write_rows(rows, wanted.rows(left_out), wanted.columns, left_out)
    recipe = wanted.recipe(folder, lambda: Rows(rows, "train"))
    for split in SPLITS:
        if pending:
            title, limit = f"Tokenising {split}", wanted.limits[split]
            write_shards(folder / split, Rows(rows, split), recipe, limit, wanted.threads, title)
        if not (state := last_state(folder / split)).rows:
            raise ValueError(f"{split}: {recipe.too_little(state)}")
    shutil.rmtree(rows, ignore_errors=True)
    known = {f"{split}/{name}": entry for split in SPLITS for name, entry in shard_files(folder / split).items()}
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - set(known)
    write_manifest(folder, "cache", known | hashes(folder, sorted(others - {MARKER})))


def finished(folder: Path, limits: dict[str, int | None]) -> bool:
    """Whether what is wanted is there."""
    return (folder / MARKER).is_file() and all(state.enough(limits[split]) for split, state in summary(folder).items())


def summary(folder: Path) -> dict[str, State]:
    """How far each split is prepared."""
    return {split: last_state(folder / split) for split in SPLITS}
