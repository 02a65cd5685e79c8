"""The stages of data preparation: rows of text -> tokenizer -> shards of token ids, each kept when it is finished."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common.files import remove
from common.manifest import DamagedError, check_files, check_manifest, hashes, names, write_manifest
from lightning_modules.data.rows import SPLITS, Row, Rows, write_rows
from lightning_modules.data.shards import Recipe, State, last_state, read_state, shard_files, write_shards

FORMAT = 3
"""Part of every cache key: raise it when the meaning of a cache folder changes."""

ROWS, TOKENIZER = "rows", "tokenizer"
"""Folders of the first two stages; the second is there only where a tokenizer is trained. Shards lie in SPLITS."""


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
    """Check what is finished already, and carry out what is not. Whoever calls holds the lock of ``folder``.

    Raises:
        DamagedError: something that is finished is not what was written.
        ValueError: a split has no text, or too little for one row of tokens, or text that the recipe cannot use.
    """
    named = _check(folder)
    try:
        _fill(folder, wanted)
    except DamagedError:
        raise
    except ValueError:  # The input is at fault; corrected, it has another key, and nobody asks for this folder again.
        for stage in (ROWS,) if named else (ROWS, TOKENIZER, *SPLITS):
            remove(folder / stage)
        raise


def _check(folder: Path) -> bool:
    """Read all that earlier runs left; says whether some of it is in use, named by the manifest."""
    manifest = check_manifest(folder) or {"files": {}}
    check_files(folder, {name: entry for name, entry in _shards(folder).items() if name not in manifest["files"]})
    for stage in (ROWS, TOKENIZER):
        check_manifest(folder / stage)
    return bool(manifest["files"])


def _fill(folder: Path, wanted: Preparation) -> None:
    rows = folder / ROWS
    if pending := not all(state.enough(wanted.limits[split]) for split, state in summary(folder).items()):
        if not rows.exists():
            left_out = {split: Counter[str]() for split in SPLITS}
            write_rows(rows, wanted.rows(left_out), wanted.columns, left_out)
        if any(state.digest != Rows(rows, split).digest(state.chunks) for split, state in summary(folder).items()):
            # A Hub dataset has changed under its name. Nothing is of use then: the tokenizer learnt from it, too.
            write_manifest(folder, "cache", {})
            for stage in (TOKENIZER, *SPLITS):
                remove(folder / stage)
    recipe = wanted.recipe(folder, lambda: Rows(rows, "train"))
    for split in SPLITS:
        if pending:
            title, limit = f"Tokenising {split}", wanted.limits[split]
            write_shards(folder / split, Rows(rows, split), recipe, limit, wanted.threads, title)
        if not (state := last_state(folder / split)).rows:
            raise ValueError(f"{split}: {recipe.too_little(state)}")
    remove(rows)
    # Only what a finished stage vouches for: what a killed run left beside it may be written over or removed.
    shards = _shards(folder)
    others = [str(Path(name).with_suffix(".json")) for name in shards]
    others += [f"{TOKENIZER}/{name}" for name in names(folder / TOKENIZER)]
    write_manifest(folder, "cache", shards | hashes(folder, others))


def _shards(folder: Path) -> dict[str, dict[str, object]]:
    return {f"{split}/{name}": entry for split in SPLITS for name, entry in shard_files(folder / split).items()}


def finished(folder: Path, limits: dict[str, int | None]) -> bool:
    """Whether what is wanted is there, with all its bytes, and named by the manifest.

    Raises:
        DamagedError: something that the manifest names is missing or cut short.
    """
    if (manifest := check_manifest(folder, contents=False)) is None:
        return False
    for split in SPLITS:
        states = [name for name in manifest["files"] if name.startswith(f"{split}/") and name.endswith(".json")]
        if not states or not read_state(folder / max(states)).enough(limits[split]):
            return False
    return True


def summary(folder: Path) -> dict[str, State]:
    """How far each split is prepared."""
    return {split: last_state(folder / split) for split in SPLITS}
