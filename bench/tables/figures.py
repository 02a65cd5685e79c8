"""Figures: one measured number against its target, recorded by the experiment that measured it, shown in a document.

A document holds `<!-- begin:NAME -->` and `<!-- end:NAME -->`; what stands between is written from the records.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_text
from common.records import record
from common.records.schema import Field
from common.tables import Table, cell

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


def latest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest record of each figure (by date, then by place in the file), in order of first appearance."""
    newest: dict[str, Mapping[str, Any]] = {}
    for entry in records:
        if entry.get("kind") != "figure":
            continue
        known = newest.get(entry["figure"])
        if known is None or entry["date"] >= known["date"]:
            newest[entry["figure"]] = entry
    return list(newest.values())


def measured(entry: Mapping[str, Any]) -> str:
    """Value, spread and unit of a figure as text."""
    if entry["value"] is None:
        return "not measured"
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


def render_table(records: Iterable[Mapping[str, Any]], only: Sequence[str] | None = None) -> str:
    """Markdown table of the newest record of each figure, and beneath it where they were measured.

    Args:
        records: Records of any kind; those that are not figures are passed over.
        only: Identifiers of the figures to show, in this order; None shows all.

    Raises:
        ValueError: There is no figure among the records, or not one of those asked for.
    """
    found = {entry["figure"]: entry for entry in latest(records)}
    missing = [name for name in only or () if name not in found]
    if missing or not found:
        raise ValueError(f"no figure {', '.join(missing)} among the records; there are: {', '.join(found) or 'none'}")
    chosen = [found[name] for name in only or found]
    rows = [
        [e["what"], measured(e), e["target"], _verdict(e), f"`{e['command']}`" if e["command"] else ""] for e in chosen
    ]
    origins: dict[str, list[str]] = defaultdict(list)
    for entry in chosen:
        origins[origin(entry)].append(entry["figure"])
    lines = [
        f"Measured on {origin}" + (f" ({', '.join(names)})" if len(origins) > 1 else "") + ".\n"
        for origin, names in origins.items()
    ]
    return Table(["figure", "measured", "target", "reached", "command"], rows).markdown() + "\n" + "\n".join(lines)


def update_file(path: str | os.PathLike, marker: str, table: str) -> None:
    """Replace the text between a document's markers, atomically (written beside, then renamed).

    Args:
        path: The document.
        marker: NAME in `<!-- begin:NAME -->` and `<!-- end:NAME -->`.
        table: New text between them.

    Raises:
        ValueError: The markers are not there exactly once each, in this order; the file is left as it was.
    """
    path = Path(path)
    begin, end = f"<!-- begin:{marker} -->", f"<!-- end:{marker} -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path.name} must contain {begin} and then {end}, once each")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    write_text(path, f"{before}\n\n{table.strip()}\n\n{after}")
