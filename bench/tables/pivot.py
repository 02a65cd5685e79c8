"""One value of many records as a table: a row and a column for each combination, mean ± sd where runs were repeated."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from bench.tables import figures
from bench.tables.compare import lookup
from common.tables import Table, cell


def conditions(text: str) -> dict[str, str]:
    """Conditions of `where` as text: "kind=wire,axes.network=*bit"."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def where(records: Iterable[Mapping[str, Any]], conditions: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Records whose fields (dots reach into blocks) read as the conditions say, `*` for anything."""
    wanted = conditions.items()
    return [r for r in records if all(fnmatchcase(str(lookup(r, field)), text) for field, text in wanted)]


def pivot(
    records: Sequence[Mapping[str, Any]], rows: Sequence[str], column: str, values: Sequence[str], repeat: str = "seed"
) -> tuple[Table, list[Mapping[str, Any]]]:
    """Table of ``values`` by ``rows`` (fields, one column each) and ``column`` (a field, one column a value of it).

    Records that agree in all of these are repeats of one measurement: they are averaged over different ``repeat``
    (mean ± sample sd); of the same ``repeat`` the newest stands. The ``value`` of a figure stands with its own spread.

    Returns:
        The table, and the records that stand in it.

    Raises:
        ValueError: No record has any of the values.
    """
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for entry in records:
        if any(lookup(entry, value) is not None for value in values):
            key = (*(_text(entry, row) for row in rows), _text(entry, column), lookup(entry, repeat))
            if key not in newest or entry["date"] >= newest[key]["date"]:
                newest[key] = entry
    if not newest:
        raise ValueError(f"no record has {' or '.join(values)}")
    across = list(dict.fromkeys(key[-2] for key in newest))
    heads = [(name, value) for name in across for value in values]
    body = []
    for left in dict.fromkeys(key[:-2] for key in newest):
        cells = [_mean([e for key, e in newest.items() if key[:-1] == (*left, name)], value) for name, value in heads]
        body.append([*left, *cells])
    titles = [name if len(values) == 1 else f"{name}: {_title(value)}" for name, value in heads]
    return Table([*map(_title, rows), *titles], body), list(newest.values())


def _title(field: str) -> str:
    return field.rpartition(".")[2].replace("_", " ")


def _text(entry: Mapping[str, Any], field: str) -> str:
    return cell(lookup(entry, field))


def _mean(entries: Sequence[Mapping[str, Any]], value: str) -> str | None:
    found = [number for e in entries if (number := lookup(e, value)) is not None]
    if not found:
        return None
    # a figure brings its own spread
    own = entries[0].get("spread") if value == "value" else None
    spread = figures.spread(found) if len(found) > 1 else own
    return cell(sum(found) / len(found)) + ("" if spread is None else f" ± {cell(spread)}")
