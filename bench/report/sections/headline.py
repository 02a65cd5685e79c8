"""Every method in every setting on one line: quality, time, bytes, and what compression bought."""

from collections.abc import Sequence
from typing import Any

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence
from bench.report.groups import SETTING, Group, Panel, panels, varying
from bench.report.values import Spread, count, per_step, ratio, spread
from common.tables import NOT_RECORDED, Table

_LEAD = (
    "One row per method and setting, over seeds: mean ± sample standard deviation. Speed-up is the median step time of "
    "the uncompressed run in the same setting over that of the method. The ideal step computes, sends its bytes at the "
    "link's rate and does nothing else. Ratio is the gradient bytes of an ideal fp32 "
    "ring over the gradient bytes sent, so an uncompressed reduction that sends twice the ideal has ratio 0.5."
)
_GAIN = 1.02  # a speed-up below is none


def section(evidence: Evidence) -> Section | None:
    """The best of each setting, and the headline table; None without training runs."""
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
    headers += ["all sent (MB/step)", "ratio to fp32 ring", "speed-up (×)", "remarks"]
    rows = [[*([panel.title] if setting else []), *_row(panel, one)] for panel in found for one in panel.groups]
    constant = [f"{name} {value}" for name, value in _constant(groups).items()]
    note = f"Equal in all runs: {'; '.join(constant)}." if constant else ""
    runs = [run for one in groups for run in one.records]
    best = [row for panel in found if (row := _best(panel))]
    said = (
        f"{len({one.method for one in groups})} methods in {len(found)} settings; the table above has the best of each."
    )
    said = said if len(best) > 1 else _verdict(found)
    sheets = [Sheet("headline", "Methods by setting", Table(headers, rows), note, said, records=runs)]
    if len(best) > 1:
        columns = ["setting", "methods", "fastest", "speed-up (×)", "fewest bytes", "fewer bytes (×)"]
        table = Table([*columns, "lowest PPL", "PPL"], best)
        sheets.insert(0, Sheet("best", "The best of each setting", table, verdict=_verdict(found), records=runs))
    return Section("headline", "Results", _LEAD, sheets)


def _verdict(found: Sequence[Panel]) -> str:
    """In how many settings compression made the step faster, and where most."""
    gains = [(panel, one, gain) for panel in found if (best := _fastest(panel)) for one, gain in [best]]
    if not gains:
        return f"{count(len(found), 'setting')}, and none with a compressed and an uncompressed run to compare."
    faster = [gain for gain in gains if gain[2].mean >= _GAIN]
    panel, one, gain = max(gains, key=lambda found: found[2].mean)
    where = f" ({panel.title})" if panel.title else ""
    most = f"most with {one.method}, {gain.mean:.2f} ×{where}" if faster else f"at best {gain.mean:.2f} ×"
    return f"A compressed step was faster in {len(faster)} of {count(len(gains), 'setting')}: {most}."


def _fastest(panel: Panel) -> tuple[Group, Spread] | None:
    pairs = [(one, gain) for one in panel.groups if not one.uncompressed and (gain := panel.speedup(one))]
    return max(pairs, key=lambda pair: pair[1].mean, default=None)


def _best(panel: Panel) -> list[Any] | None:
    """A row of the table of bests; None where there is nothing to choose from."""
    if len(panel.groups) < 2:
        return None
    compressed = [one for one in panel.groups if not one.uncompressed]
    sent = [(one, size) for one in compressed if (size := one.bytes_per_step) and size.mean]
    least = min(sent, key=lambda pair: pair[1].mean, default=None)
    plain = panel.baseline.bytes_per_step if panel.baseline else None
    judged = [(one, ppl) for one in panel.groups if (ppl := one.ppl)]
    lowest = min(judged, key=lambda pair: pair[1].mean, default=None)
    fastest = _fastest(panel)
    return [
        panel.title,
        len(panel.groups),
        *((fastest[0].method, fastest[1]) if fastest else (None, None)),
        *((least[0].method, ratio(plain, least[1])) if least else (None, None)),
        *((lowest[0].method, lowest[1]) if lowest else (None, None)),
    ]


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
