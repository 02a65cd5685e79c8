"""All features on one model: what each step adds."""

from collections.abc import Mapping
from typing import Any

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence
from common.tables import Table

_LEAD = (
    "One model pruned, sparsified, quantized and read with fewer tokens, step upon step; each beside the dense model."
)
_COLUMNS = {
    "rung": "step",
    "nll_rise": "rise of the loss (nats)",
    "own_rise": "of it this step's (nats)",
    "right": "right answers (share)",
    "prefill_speedup": "prefill (×)",
    "prefill_bound": "bound of it (×)",
    "prefill_gain": "of it this step's (×)",
    "decode_speedup": "decode (×)",
    "decode_bound": "bound of that (×)",
    "decode_gain": "of that this step's (×)",
    "weight_bytes": "weights (bytes)",
    "file_bytes": "files (bytes)",
    "kv_bytes": "cache (bytes)",
}


def parse(block: Any) -> list[list[Any]]:
    """Rows of the record's block `ladder`, in the order of `_COLUMNS`; the first one is the dense model."""
    given: list[Mapping[str, Any]] = list(block["rungs"])
    rungs = [dict(rung) for rung in given]
    for before, rung in zip(given, rungs[1:], strict=False):
        if "nll_rise" in before and "nll_rise" in rung:
            rung["own_rise"] = rung["nll_rise"] - before["nll_rise"]
    return [[str(rung["rung"]), *(rung.get(name) for name in list(_COLUMNS)[1:])] for rung in rungs]


def section(evidence: Evidence) -> Section | None:
    """A table for every run that climbed; None without one."""
    found = evidence.blocks("ladder", parse)
    sheets = [
        Sheet(f"together-{index}", f"Step by step: {name}", Table(list(_COLUMNS.values()), rows), "", _said(rows),
              records=evidence.having("ladder"))
        for index, (name, rows) in enumerate(found)
    ]  # fmt: skip
    return Section("together", "All together", _LEAD, sheets) if sheets else None


def _said(rows: list[list[Any]]) -> str:
    names = list(_COLUMNS)
    last = dict(zip(names, rows[-1], strict=True)) if rows else {}
    parts = [
        f"{phase} {last[f'{phase}_speedup']:.2f} × as fast"
        for phase in ("prefill", "decode")
        if isinstance(last.get(f"{phase}_speedup"), int | float)
    ]
    if isinstance(last.get("nll_rise"), int | float):
        parts.append(f"a loss that rises by {last['nll_rise']:.3f} nats")
    return f"All together: {', '.join(parts)}." if parts else f"{len(rows)} steps."
