"""This results file beside another one: figures and runs that are in both, and what only one of them has."""

import math
from collections.abc import Callable
from typing import Any

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence, experiment
from bench.report.groups import Group, group
from bench.report.values import Record, Spread, count
from common.tables import Table

_LEAD = (
    "Matched by experiment and figure, and by method and setting. A change counts when it is larger than both spreads "
    "together. Times of two machines do not compare: the column says where the machine is another."
)
_MEASURES: dict[str, Callable[[Group], Spread | None]] = {
    "step time (ms)": lambda one: one.step_ms,
    "validation PPL": lambda one: one.ppl,
    "sent (MB/step)": lambda one: one.bytes_per_step and one.bytes_per_step.scaled(1e-6),
}


def section(evidence: Evidence) -> Section | None:
    """What changed; None where nothing is compared."""
    other = evidence.against
    if other is None:
        return None
    lonely: list[list[Any]] = []
    sheets = [sheet for make in (_figures, _runs) if (sheet := make(evidence, other, lonely))]
    if lonely:
        counts = [sum(row[1] == where for row in lonely) for where in ("this file", "the other file")]
        said = f"{counts[0]} only in this file, {counts[1]} only in the other."
        sheets.append(Sheet("only-in-one", "In one file only", Table(["what", "where"], lonely), verdict=said))
    said = " ".join(sheet.verdict for sheet in sheets if sheet.name != "only-in-one") or "They have nothing in common."
    return Section("comparison", "Compared with the other file", f"{said} {_LEAD}", sheets)


def _figures(new: Evidence, old: Evidence, lonely: list[list[Any]]) -> Sheet | None:
    here, there = ({(experiment(one), one["figure"]): one for one in some.figures} for some in (new, old))
    lonely += [[one["what"], "this file"] for key, one in here.items() if key not in there]
    lonely += [[one["what"], "the other file"] for key, one in there.items() if key not in here]
    pairs = [(there[key], one) for key, one in here.items() if key in there]
    if not pairs:
        return None
    rows = []
    for before, after in pairs:
        old_value, new_value = (_spread(one) for one in (before, after))
        changed = _beyond(old_value, new_value)
        rows.append([after["what"], old_value, new_value, after["unit"], _percent(old_value, new_value), changed,
                     _verdicts(before, after)])  # fmt: skip
    rows.sort(key=lambda row: (row[6] == "", not row[5], -abs(row[4] or 0.0)))
    lost, won = (sum(row[6] == said for row in rows) for said in ("target now missed", "target now reached"))
    moved = sum(row[5] for row in rows)
    said = f"{count(len(rows), 'figure')} in both: {moved} changed beyond their spread, {lost} now miss their target, "
    said += f"{won} now reach it."
    headers = ["figure", "other file", "this file", "unit", "change (%)", "beyond the spread", "target"]
    records = [one for pair in pairs for one in pair]
    return Sheet("compared-figures", "Figures in both", Table(headers, rows), "", said, "unit", records)


def _runs(new: Evidence, old: Evidence, lonely: list[list[Any]]) -> Sheet | None:
    ours = {id(run) for one in new.groups for run in one.records}
    every = group([run for one in (*old.groups, *new.groups) for run in one.records])  # names depend on all of them
    found: dict[tuple[str, ...], dict[bool, list[Record]]] = {}
    names: dict[tuple[str, ...], Group] = {}
    for one in every:
        key = _key(one)
        names.setdefault(key, one)
        for run in one.records:
            found.setdefault(key, {}).setdefault(id(run) in ours, []).append(run)
    rows: list[list[Any]] = []
    for key, sides in found.items():
        one = names[key]
        what = f"{one.method}, {one.where(('model', 'engine', 'ranks', 'link', 'steps'))}"
        if len(sides) < 2:
            lonely.append([f"runs of {what}", "this file" if True in sides else "the other file"])
            continue
        before, after = (Group(one.method, one.setting, sides[side], one.uncompressed) for side in (False, True))
        remark = "another machine" if len({g.setting["machine"] for g in every if _key(g) == key}) > 1 else ""
        for name, read in _MEASURES.items():
            pair = read(before), read(after)
            if any(pair):
                rows.append([what, name, *pair, _percent(*pair), _beyond(*pair), remark])
    if not rows:
        return None
    moved = sum(row[5] for row in rows)
    ways = count(len({row[0] for row in rows}), "way")
    said = f"{ways} of training in both: {moved} of {len(rows)} measurements changed beyond their spread."
    headers = ["runs", "measured", "other file", "this file", "change (%)", "beyond the spread", "remarks"]
    return Sheet("compared-runs", "Runs in both", Table(headers, rows), "", said, "measured")


def _key(one: Group) -> tuple[str, ...]:
    return (one.method, *(value for name, value in one.setting.items() if name != "machine"))


def _spread(one: Record) -> Spread | None:
    return None if one["value"] is None else Spread(float(one["value"]), one["spread"], 1)


def _beyond(old: Spread | None, new: Spread | None) -> bool:
    return old is not None and new is not None and abs(new.mean - old.mean) > old.error + new.error


def _percent(old: Spread | None, new: Spread | None) -> float | None:
    if old is None or new is None or not old.mean or not math.isfinite(new.mean / old.mean):
        return None
    return 100 * (new.mean / old.mean - 1)


def _verdicts(old: Record, new: Record) -> str:
    if old["reached"] == new["reached"] or None in (old["reached"], new["reached"]):
        return ""
    return "target now reached" if new["reached"] else "target now missed"
