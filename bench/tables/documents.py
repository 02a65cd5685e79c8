"""Tables and single figures in documents, written from records.

A comment in a document is the recipe; what stands between it and the next `<!-- end -->` is made from it:

    <!-- table: figures pretraining.jsonl only=exact-resume,int8-* columns=figure,measured -->
    <!-- table: pivot links.jsonl rows=method column=case values=nmse where=kind=method -->
    <!-- table: compare profile.jsonl fields=world_size,tokens_per_s -->
    <!-- table: memory llama-1b llama-8b ranks=1,8 engine=fsdp -->
    <!-- table: records pretraining.jsonl profile.jsonl -->
    <!-- table: pictures -->: all of them, for a page in docs/
    <!-- table: figures gpu.jsonl only=gpu-* absent="not run yet" -->: what stands there until there is such a file
    … and in a sentence: <!-- figure: pretraining.jsonl int8-quality digits=2 -->-0.14 %<!-- end -->

`python -m bench table` writes them anew; `python -m bench table --check` says which differ from their records.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import memory
from bench.network import bounds
from bench.tables import compare, figures, pictures, pivot
from common.records import record
from common.tables import Table

ROOT = Path(__file__).parents[2]
RECORDS = "docs/results/records"
_BLOCK = re.compile(r"<!-- (table|figure): ([^\n]*?) -->(.*?)<!-- end -->", re.S)
_OPENING, _CLOSING = re.compile(r"<!-- (?:table|figure):"), "<!-- end -->"
Records = list[dict[str, Any]]


def documents(root: Path = ROOT) -> list[Path]:
    """Every document of a repository: Markdown at the top, READMEs of packages, the pages of docs/."""
    packages = [path.parent for pattern in ("*/__init__.py", "*/*/__init__.py") for path in root.glob(pattern)]
    readmes = [folder / "README.md" for folder in packages if (folder / "README.md").is_file()]
    return sorted({*root.glob("*.md"), *readmes, *root.glob("docs/**/*.md")})


def render(text: str, records: Path) -> str:
    """The text of a document with all tables and figures as the records have them now.

    Args:
        text: The document.
        records: Folder of the records' files.

    Raises:
        ValueError: A recipe names a file, a figure or an option that is not there, or has no end; the recipe is named.
    """
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)) or text.count(_CLOSING) != len(_BLOCK.findall(text)):
        raise ValueError(f"every table and figure needs a recipe in one line and one {_CLOSING} behind it")

    def replaced(block: re.Match[str]) -> str:
        kind, recipe, _ = block.groups()
        try:
            made = _MAKERS[kind](records, *_arguments(recipe))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"<!-- {kind}: {recipe} -->: {error}") from error
        space = "\n\n" if kind == "table" else ""
        return f"<!-- {kind}: {recipe} -->{space}{made.strip()}{space}{_CLOSING}"

    return _BLOCK.sub(replaced, text)


def drifted(root: Path) -> dict[Path, str]:
    """What those documents of a repository that differ from their records should be.

    Raises:
        ValueError: See `render`; the message begins with the document.
    """
    found = {}
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        try:
            rendered = render(text, root / RECORDS)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from error
        if rendered != text:
            found[path] = rendered
    return found


def _arguments(recipe: str) -> tuple[list[str], dict[str, str]]:
    """Words, and options as name=value."""
    words = shlex.split(recipe)
    pairs = [word.split("=", 1) for word in words if "=" in word]
    return [word for word in words if "=" not in word], dict(pairs)


def _read(folder: Path, name: str) -> Records:
    records, broken = record.read(folder / name)
    if broken:
        raise ValueError(f"{name}: broken line {', '.join(map(str, broken))}")
    return records


def _table(folder: Path, words: list[str], options: Mapping[str, str]) -> str:
    if not words or words[0] not in _TABLES:
        raise ValueError(f"the first word says which table: {', '.join(_TABLES)}")
    return _TABLES[words[0]](folder, *words[1:], **options)


def _figures(
    folder: Path, file: str, only: str | None = None, columns: str | None = None, absent: str | None = None
) -> str:
    if absent is not None and not (folder / file).exists():
        return absent
    return figures.render_table(_read(folder, file), _list(only), _list(columns) or figures.COLUMNS)


def _pivot(folder: Path, file: str, rows: str, column: str, values: str, where: str = "", repeat: str = "seed") -> str:
    found = pivot.where(bounds.annotate(_read(folder, file)), pivot.conditions(where))
    table, shown = pivot.pivot(found, rows.split(","), column, values.split(","), repeat)
    return f"{table.markdown()}\n{figures.origins(shown)}"


def _compare(folder: Path, file: str, runs: str | None = None, fields: str | None = None) -> str:
    found = compare.select(_read(folder, file), _list(runs))
    return f"{compare.compare(found, _list(fields) or compare.DEFAULT_FIELDS).markdown()}\n{figures.origins(found)}"


def _records(folder: Path, *files: str) -> str:
    """Where the records of a page lie, and at which commits they were made."""
    rows = []
    for file in files:
        found = _read(folder, file)
        superseded = sum(one.get("kind") == "figure" for one in found) - len(figures.latest(found))
        commits = sorted({figures.commit(one) for one in found})
        rows.append([f"[{file}](records/{file})", len(found), superseded, ", ".join(commits)])
    return Table(["file", "records", "superseded", "commits"], rows).markdown()


def _memory(folder: Path, *models: str, ranks: str, **options: Any) -> str:
    """What training takes; computed, so it has no records."""
    counts = [int(count) for count in ranks.split(",")]
    return memory.table(list(models), counts, **options).markdown()


def _pictures(_folder: Path) -> str:
    return pictures.gallery()


def _figure(folder: Path, words: list[str], options: Mapping[str, str]) -> str:
    return _single(folder, *words, **options)


def _single(folder: Path, file: str, figure: str, digits: str | None = None) -> str:
    found = figures.newest(_read(folder, file))
    if figure not in found:
        raise ValueError(f"no figure {figure} in {file}")
    return figures.measured(found[figure], int(digits) if digits else None)


def _list(text: str | None) -> list[str] | None:
    return text.split(",") if text else None


_TABLES: dict[str, Callable[..., str]] = {
    "figures": _figures,
    "pivot": _pivot,
    "compare": _compare,
    "records": _records,
    "memory": _memory,
    "pictures": _pictures,
}
_MAKERS = {"table": _table, "figure": _figure}
