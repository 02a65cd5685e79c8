"""Figures: one measured number against its target, recorded by the experiment that measured it."""

import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from common.records import record
from common.records.schema import Field
from common.tables import Table, cell

_EXPERIMENT = re.compile(r"-m bench experiment (\w+)")
FIELDS: dict[str, Field] = {
    "kind": Field("str", "", "always 'figure'", nullable=False),
    "figure": Field("str", "", "identifier; the newest record of an identifier stands", nullable=False),
    "what": Field("str", "", "what was measured, in words", nullable=False),
    "value": Field("number", "see unit", "the measured value; null when it could not be measured"),
    "unit": Field("str", "", "unit of value and spread", nullable=False),
    "target": Field("str", "", "the target in words", nullable=False),
    "reached": Field("bool", "", "whether the target is met; null when not measured"),
    "spread": Field("number", "see unit", "half-width of the spread over repeats, or null"),
    "command": Field("str", "", "command that measures it again", nullable=False),
    "details": Field("object", "", "what else a reader needs: repeats, bound, baseline"),
}


def append(
    path: str | os.PathLike,
    *,
    figure: str,
    what: str,
    value: float | None,
    unit: str,
    target: str,
    reached: bool | None,
    command: str,
    spread: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record a figure with the stamp of code and machine.

    Args:
        path: The .jsonl file to append to.
        figure: Identifier, such as "prefill-speedup-4096".
        what: What was measured, in words.
        value: Measured value in `unit`; None when it could not be measured here.
        unit: Unit of `value`, "" for none.
        target: The target in words, such as "≥ 2.0× at 4096 tokens".
        reached: Whether the target is met; None when not measured.
        command: Command that measures it again.
        spread: Half-width of the spread over repeats, in `unit`.
        details: What else a reader needs.

    Returns:
        The record as appended.

    Raises:
        ValueError: A field has the wrong type, or a verdict is given without a value.
    """
    entry = {
        "kind": "figure",
        "figure": figure,
        "what": what,
        "value": value,
        "unit": unit,
        "target": target,
        "reached": reached,
        "spread": spread,
        "command": command,
        "details": dict(details or {}),
    }
    problems = record.check_types(entry, FIELDS)
    if value is None and reached is not None:
        problems.append(f"reached is {reached} but value is null")
    if problems:
        raise ValueError(f"invalid figure {figure!r}: " + "; ".join(problems))
    entry |= record.stamp()
    record.append(path, entry)
    return entry


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over repeats; None of a single one, or where one diverged (``statistics`` fails there)."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def latest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest record of each figure (by date, then by place in the file), in order of first appearance.

    What was measured on another GPU is another figure: one card's do not hide another's.
    """
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in records:
        if entry.get("kind") != "figure":
            continue
        name = entry["figure"], gpu(entry)
        known = found.get(name)
        if known is None or entry["date"] >= known["date"]:
            found[name] = entry
    return list(found.values())


def newest(records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The newest record of each figure by its name, whatever it was measured on."""
    return {one["figure"]: one for one in sorted(latest(records), key=lambda one: str(one["date"]))}


def experiment(entry: Mapping[str, Any]) -> str:
    """Name of the experiment that measures a figure; "" where its command names none."""
    found = _EXPERIMENT.search(str(entry.get("command") or "")) if entry.get("kind") == "figure" else None
    return found[1] if found else ""


def gpu(entry: Mapping[str, Any]) -> str:
    """The GPUs that a record was made on; "" for none."""
    cards = (entry.get("machine") or {}).get("gpus") or []
    return ", ".join(str(card.get("name", card)) if isinstance(card, Mapping) else str(card) for card in cards)


def measured(entry: Mapping[str, Any], digits: int | None = None) -> str:
    """Value, spread and unit of a figure as text; rounded to so many significant digits and without spread if given."""
    if entry["value"] is None:
        return "not measured"
    if digits is not None:
        return f"{cell(float(format(entry['value'], f'.{digits}g')))} {entry['unit']}".strip()
    spread = f" ± {cell(entry['spread'])}" if entry.get("spread") is not None else ""
    return f"{cell(entry['value'])}{spread} {entry['unit']}".strip()


def _verdict(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "not measured"
    return {True: "yes", False: "**no**", None: "reported"}[entry["reached"]]


def origin(entry: Mapping[str, Any]) -> str:
    """Hardware, versions, commit and day of a record."""
    machine, versions = entry["machine"], entry["versions"]
    gpus = sorted({gpu["name"] for gpu in machine["gpus"]})
    hardware = [f"{len(machine['gpus'])} × {' / '.join(gpus)}"] if gpus else []
    hardware += [str(machine["cpu"]), f"{machine['cores_usable']} cores", f"{machine['ram_gb']:.0f} GB RAM"]
    commit = (entry["git_commit"] or "unknown commit")[:10] + (" with local changes" if entry["git_dirty"] else "")
    return f"{', '.join(hardware)}; torch {versions['torch']}; {entry['date'][:10]}; {commit}"


def commit(entry: Mapping[str, Any]) -> str:
    """The commit at which a record was made, short."""
    return (entry["git_commit"] or "unknown commit")[:10] + (" with local changes" if entry["git_dirty"] else "")


def command(entry: Mapping[str, Any]) -> str:
    """The command that measures a figure again, without the records' file, which has moved since: it has its own."""
    return str(entry["command"]).partition(" --records ")[0]


def origins(entries: Iterable[Mapping[str, Any]]) -> str:
    """Where all of the records were measured: a line for each machine, with commits and days."""
    made: dict[str, dict[str, None]] = defaultdict(dict)
    for entry in entries:
        machine, _, place = origin(entry).rpartition("; torch ")
        version, day, at = place.split("; ")
        made[f"{machine}; torch {version}"][f"{at}, {day}"] = None
    return "\n".join(f"Measured on {machine} ({'; '.join(at)}).\n" for machine, at in made.items())


COLUMNS = ("figure", "measured", "target", "reached")


def render_table(
    records: Iterable[Mapping[str, Any]], only: Sequence[str] | None = None, columns: Sequence[str] = COLUMNS
) -> str:
    """Markdown table of the newest record of each figure; beneath it where they were measured, and how again.

    Args:
        records: Records of any kind; those that are not figures are passed over.
        only: Identifiers of the figures to show, in this order, `*` for anything; None shows all.
        columns: Columns to show, of `COLUMNS`, `commit` and `GPU`; where commits or cards differ, these two are added.

    Raises:
        ValueError: There is no figure among the records, not one of those asked for, or no such column.
    """
    found = latest(records)
    names = list(dict.fromkeys(entry["figure"] for entry in found))
    wanted = {name: [figure for figure in names if fnmatchcase(figure, name)] for name in only or names}
    missing = [name for name, figures in wanted.items() if not figures]
    if missing or not found:
        raise ValueError(f"no figure {', '.join(missing)} among the records; there are: {', '.join(names) or 'none'}")
    order = list(dict.fromkeys(chain.from_iterable(wanted.values())))
    chosen = sorted((e for e in found if e["figure"] in order), key=lambda e: order.index(e["figure"]))
    if len({gpu(entry) for entry in chosen if gpu(entry)}) > 1:
        columns = [*columns, "GPU"]
    if len({commit(entry) for entry in chosen}) > 1:
        columns = [*columns, "commit"]
    makers = {
        "figure": lambda entry: entry["what"],
        "measured": measured,
        "target": lambda entry: entry["target"],
        "reached": _verdict,
        "commit": commit,
        "GPU": gpu,
    }
    unknown = [name for name in columns if name not in makers]
    if unknown:
        raise ValueError(f"no column {', '.join(unknown)}; there are: {', '.join(makers)}")
    rows = [[makers[name](entry) for name in columns] for entry in chosen]
    again = "; ".join(f"`{one}`" for one in dict.fromkeys(map(command, chosen)) if one)
    return (
        Table(columns, rows).markdown() + f"\n{origins(chosen)}" + (f"\nMeasured again by {again}.\n" if again else "")
    )
