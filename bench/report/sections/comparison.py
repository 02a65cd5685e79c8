"""This results file beside another one: figures and runs that are in both, and what only one of them has."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence, measured_on
from bench.report.groups import Group, group, machine
from bench.report.values import Record, Spread, count
from bench.tables.figures import experiment
from common.tables import Table

_LEAD = (
    "Matched by experiment, figure, model and unit, and by method and setting. A change counts when it is larger than "
    "both spreads together; where one of them is not known, nobody knows whether it counts. Times of two machines do "
    "not compare: remarks say where the machine is another."
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
    here, there = ({_figure_key(one): one for one in some.figures} for some in (new, old))
    lonely += [[one["what"], "this file"] for key, one in here.items() if key not in there]
    lonely += [[one["what"], "the other file"] for key, one in there.items() if key not in here]
    pairs = [(there[key], one) for key, one in here.items() if key in there]
    if not pairs:
        return None
    rows: list[list[Any]] = []
    for before, after in pairs:
        old_value, new_value = (_spread(one) for one in (before, after))
        remarks = _remarks(old_value, new_value, machine(before) != machine(after))
        rows.append([after["what"], measured_on(after), old_value, new_value, after["unit"],
                     _percent(old_value, new_value), _beyond(old_value, new_value), _verdicts(before, after),
                     remarks])  # fmt: skip
    rows.sort(key=lambda row: (row[7] == "", not row[6], -abs(row[5] or 0.0)))
    lost, won = (sum(row[7] == said for row in rows) for said in ("target now missed", "target now reached"))
    said = f"{count(len(rows), 'figure')} in both: {_counted([row[6] for row in rows])}, {lost} now miss their target, "
    said += f"{won} now reach it."
    headers = ["figure", "model", "other file", "this file", "unit", "change (%)", "beyond the spread", "target",
               "remarks"]  # fmt: skip
    records = [one for pair in pairs for one in pair]
    return Sheet("compared-figures", "Figures in both", Table(headers, rows), "", said, "unit", records)


def _runs(new: Evidence, old: Evidence, lonely: list[list[Any]]) -> Sheet | None:
    ours = {id(run) for one in new.groups for run in one.records}
    every = group([run for one in (*old.groups, *new.groups) for run in one.records])  # names depend on all of them
    found: dict[tuple[str, ...], dict[bool, dict[str, Group]]] = {}  # by setting, side and machine
    for one in every:
        sides = found.setdefault(_key(one), {False: {}, True: {}})
        for side, machines in sides.items():
            if records := [run for run in one.records if (id(run) in ours) == side]:
                machines[one.setting["machine"]] = replace(one, records=records)
    rows: list[list[Any]] = []
    for sides in found.values():
        pairs = _pairs(sides[False], sides[True])
        paired = {id(one) for pair in pairs for one in pair}
        for side, machines in sides.items():
            left = [f"runs of {_what(one)}" for one in machines.values() if id(one) not in paired]
            lonely += [[what, "this file" if side else "the other file"] for what in left]
        for before, after in pairs:
            elsewhere = before.setting["machine"] != after.setting["machine"]
            for name, read in _MEASURES.items():
                pair = read(before), read(after)
                if any(pair):
                    remarks = _remarks(*pair, elsewhere)
                    rows.append([_what(after), name, *pair, _percent(*pair), _beyond(*pair), remarks])
    if not rows:
        return None
    ways = count(len({row[0] for row in rows}), "way")
    said = f"{ways} of training in both: of {len(rows)} measurements {_counted([row[5] for row in rows])}."
    headers = ["runs", "measured", "other file", "this file", "change (%)", "beyond the spread", "remarks"]
    return Sheet("compared-runs", "Runs in both", Table(headers, rows), "", said, "measured")


def _pairs(old: dict[str, Group], new: dict[str, Group]) -> list[tuple[Group, Group]]:
    """The groups of each machine that both sides have; without such a machine, the last of each side."""
    same = [(old[name], one) for name, one in new.items() if name in old]
    return same or ([([*old.values()][-1], [*new.values()][-1])] if old and new else [])


def _what(one: Group) -> str:
    return f"{one.method}, {one.where(('model', 'engine', 'ranks', 'link', 'steps'))}"


def _key(one: Group) -> tuple[str, ...]:
    return (one.method, *(value for name, value in one.setting.items() if name != "machine"))


def _figure_key(one: Record) -> tuple[str, ...]:
    return experiment(one), one["figure"], measured_on(one), one["unit"]


def _spread(one: Record) -> Spread | None:
    return None if one["value"] is None else Spread(float(one["value"]), one["spread"], 1)


def _beyond(old: Spread | None, new: Spread | None) -> bool | None:
    """Whether two values differ by more than both spreads; None where that is not known."""
    if old is None or new is None or not (_known(old) and _known(new)):
        return None
    return abs(new.mean - old.mean) > old.error + new.error


def _known(one: Spread) -> bool:
    return one.sd is not None and math.isfinite(one.sd)


def _remarks(old: Spread | None, new: Spread | None, elsewhere: bool) -> str:
    alone = [place for place, one in (("the other file", old), ("this file", new)) if one and not _known(one)]
    said = ["another machine"] if elsewhere else []
    return "; ".join([*said, *([f"no spread in {' and '.join(alone)}"] if alone else [])])


def _counted(beyond: list[bool | None]) -> str:
    unknown = f" (of {beyond.count(None)} nobody knows)" if None in beyond else ""
    return f"{beyond.count(True)} changed beyond their spread{unknown}"


def _percent(old: Spread | None, new: Spread | None) -> float | None:
    if old is None or new is None or not old.mean or not math.isfinite(new.mean / old.mean):
        return None
    return 100 * (new.mean / old.mean - 1)


def _verdicts(old: Record, new: Record) -> str:
    if old["reached"] == new["reached"] or None in (old["reached"], new["reached"]):
        return ""
    return "target now reached" if new["reached"] else "target now missed"
