"""Run records side by side: one column a run, one row a quantity. What was not measured says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.records.schema import OPTIONAL, REQUIRED
from common.tables import Table, percent

DEFAULT_FIELDS = (
    "world_size",
    "compress_method",
    "step_time_ms_p50",
    "step_time_ms_p90",
    "tokens_per_s",
    "comm_ratio",
    "comm_time_ms_by_op",
    "bytes_raw_total",
    "bytes_compressed_total",
    "compression_ratio",
    "val_ppl",
)


def select(records: Sequence[Mapping[str, Any]], runs: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    """The run records among `records`, all or those named, in the order asked for.

    Raises:
        ValueError: A name is not there; the message lists the names that are.
    """
    candidates = [r for r in records if r.get("kind", "run") == "run"]
    if runs is None:
        return candidates
    known = list(dict.fromkeys(str(r.get("run_name")) for r in candidates))
    missing = [name for name in runs if name not in known]
    if missing:
        raise ValueError(f"no record of run {', '.join(missing)}; there are: {', '.join(known) or 'none'}")
    return [r for name in runs for r in candidates if r.get("run_name") == name]


def lookup(record: Mapping[str, Any], field: str) -> Any:
    """Value of a field, dots reaching into blocks ("machine.cpu"); None when it is not recorded."""
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _label(field: str) -> str:
    known = REQUIRED.get(field) or OPTIONAL.get(field)
    return f"{field} ({known.unit})" if known and known.unit else field


def _operator_rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Two rows an operator: its time over the measured steps, and its share of step time.

    A run that recorded its operators and has none of this name spent 0 ms in it; a run that recorded none has none.
    """
    times = [r.get("comm_time_ms_by_op") for r in records]
    rows: list[list[Any]] = []
    for operator in sorted({name for time in times if time for name in time}):
        spent = [None if time is None else time.get(operator, 0.0) for time in times]
        shares = [_share(r, ms) for r, ms in zip(records, spent, strict=True)]
        rows += [[f"comm time {operator} (ms)", *spent], [f"comm share {operator}", *map(percent, shares)]]
    return rows or [["comm time by operator (ms)", *times]]


def _share(record: Mapping[str, Any], spent_ms: float | None) -> float | None:
    """Share of step time spent in one operator; total / ratio is the time of all measured steps."""
    total, ratio = record.get("comm_time_ms_total"), record.get("comm_ratio")
    if spent_ms is None or total is None or ratio is None:
        return None
    return spent_ms / total * ratio if total else 0.0


def compare(records: Sequence[Mapping[str, Any]], fields: Sequence[str] = DEFAULT_FIELDS) -> Table:
    """Records side by side, one column a record.

    Args:
        records: Run records, see `select`.
        fields: Rows to show; "comm_time_ms_by_op" becomes two rows an operator.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("no run records to compare")
    rows: list[list[Any]] = []
    for field in fields:
        values = [lookup(r, field) for r in records]
        if field == "comm_time_ms_by_op":
            rows += _operator_rows(records)
        elif field == "comm_ratio":
            rows.append(["comm share of step", *map(percent, values)])
        else:
            rows.append([_label(field), *values])
    return Table(["run", *(str(r.get("run_name")) for r in records)], rows)
