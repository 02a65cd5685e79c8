"""Every method in every setting on one line: quality, time, bytes, and what compression bought."""

from typing import Any

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence
from bench.report.groups import SETTING, Group, Panel, panels, varying
from bench.report.values import Spread, count, per_step, spread
from common.tables import NOT_RECORDED, Table

_LEAD = (
    "One row per method and setting, over seeds: mean ± sample standard deviation. Speed-up is the median step time of "
    "the uncompressed run in the same setting over that of the method. The ideal step computes, sends its bytes at the "
    "link's rate and does nothing else. Ratio is the gradient bytes of an ideal fp32 "
    "ring over the gradient bytes sent, so an uncompressed reduction that sends twice the ideal has ratio 0.5."
)


def section(evidence: Evidence) -> Section | None:
    """The headline table; None without training runs."""
    groups = evidence.groups
    if not groups:
        return None
    found = panels(groups)
    setting = ["setting"] if len(found) > 1 else []
    headers = [
        *setting,
        "method",
        "seeds",
        "validation PPL",
        "step time, median (ms)",
        "ideal step (ms)",
        "gradients (MB/step)",
    ]
    headers += ["all sent (MB/step)", "ratio to fp32 ring", "speed-up", "remarks"]
    rows = [[*([panel.title] if setting else []), *_row(panel, one)] for panel in found for one in panel.groups]
    constant = [f"{name} {value}" for name, value in _constant(groups).items()]
    note = f"Equal in all runs: {'; '.join(constant)}." if constant else ""
    return Section("headline", "Results", _LEAD, [Sheet("headline", "Methods by setting", Table(headers, rows), note)])


def _constant(groups: list[Group]) -> dict[str, str]:
    differing = set(varying(groups))
    setting = groups[0].setting
    return {name: setting[name] for name in SETTING if name not in differing and setting[name] != NOT_RECORDED}


def _row(panel: Panel, group: Group) -> list[Any]:
    return [
        group.method,
        group.seeds,
        group.ppl,
        group.step_ms,
        group.spread("bound_step_time_ms"),
        _megabytes(group.spread(lambda run: per_step(run, "bytes_compressed_total"))),
        _megabytes(group.bytes_per_step),
        group.spread("compression_ratio"),
        "baseline" if group is panel.baseline else panel.speedup(group),
        _remarks(group),
    ]


def _megabytes(value: Spread | None) -> Spread | None:
    return value.scaled(1e-6) if value else None


def _remarks(group: Group) -> str:
    """What a reader must know before using the row."""
    said = []
    reasons = {str(reason) for run in group.records for reason in run.get("suspicious") or []}
    if reasons:
        said.append(f"suspicious: {'; '.join(sorted(reasons))}")
    bad = spread(run.get("nan_steps") for run in group.records)
    if bad and bad.mean:
        said.append(f"{round(bad.mean * bad.n)} steps with NaN or Inf")
    if len(group.records) > group.seeds:
        said.append(count(len(group.records), "run"))
    if any(run.get("git_dirty") for run in group.records):
        said.append("code differed from its commit")
    return ", ".join(said)
