"""What crosses the link between two hosts of two ranks when gradients are reduced inside the hosts first.

One sweep of `configs/bench`; what is finished in a `--folder` is not run again. Bytes between hosts are those of the
interface's own counter, headers taken off; the ranks of a host send equally much.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.experiments.runs import claim, sweep
from bench.network.link import rate_bits_per_s
from bench.tables import figures

RECORDS = "two_levels.jsonl"
_COMMAND = "python -m bench experiment two_levels"
_HEADERS = 66  # bytes of Ethernet (14), IPv4 (20) and TCP with timestamps (32) that the interface counts per packet
_RANKS = 2  # of a host
# method: (rival, times fewer bytes between hosts, times as fast), as they should be
_RIVALS: dict[str, tuple[str, float, float | None]] = {
    "hsdp_int8": ("hsdp_none", 3.5, 2.5),
    "ddp_two_int8": ("ddp_int8", 1.7, None),
}


def run(records: Path, folder: Path) -> None:
    """Run the sweep and append the figures.

    Raises:
        ValueError: Links cannot be emulated here, or the folder is one that ``claim`` refuses.
    """
    claim(folder)
    runs = {one["axes"]["method"]: one for one in sweep("two_levels", folder)}
    for method, one in runs.items():
        _counted(records, method, one)
    for method, (rival, fewer, faster) in _RIVALS.items():
        _against(records, runs, method, rival, fewer, faster)
    _two_hops(records, runs)
    for rival in ("flat_int8", "flat_int8_both", "flat_none"):
        _against(records, runs, "hsdp_int8", rival, 1.7, None)


def between_hosts(one: Mapping[str, Any]) -> float:
    """Bytes that a host sent to the other in a step, as its interface counted them."""
    return (one["bytes_nic_total"] - _HEADERS * one["packets_nic_total"]) / one["steps_measured"]


def gradients_between_hosts(one: Mapping[str, Any]) -> float:
    """The same without gathers of parameters, around a ring of which one of two edges leaves a host."""
    return between_hosts(one) - one["bytes_parameters_total"] / one["steps_measured"] * _RANKS / 2


def _two_hops(records: Path, runs: Mapping[str, Any]) -> None:
    hops, flat = (gradients_between_hosts(runs[method]) for method in ("flat_two_hops", "flat_int8"))
    figures.append(
        records,
        figure="gradients-two-hops-over-flat",
        what="times fewer bytes of gradients between hosts, by the interface: int8 in two hops over the flat "
        "all-to-all, two hosts of two ranks",
        value=flat / hops,
        unit="×",
        target="≥ 1.7 ×",
        reached=flat / hops >= 1.7,
        command=_COMMAND,
        details={"two hops": hops, "flat": flat},
    )


def _counted(records: Path, method: str, one: Mapping[str, Any]) -> None:
    """Bytes between hosts; where levels are counted, what Pare says of them against the interface."""
    levels = one.get("bytes_by_level") or {}
    both = not method.startswith("flat")  # where one group lies over both hosts, gathers belong to neither level
    counted = levels.get("inter", 0) * _RANKS / one["steps_measured"] if both else 0
    sent = between_hosts(one)
    deviation = 100 * (sent / counted - 1) if counted else None
    figures.append(
        records,
        figure=f"between-hosts-{method}",
        what=f"bytes from host to host in a step with `{method}`, by the interface, headers taken off"
        + ("" if deviation is None else f" (counted by Pare: {deviation:+.2f} %)"),
        value=sent / 1e6,
        unit="MB",
        target="report" if deviation is None else "within 2 % of what is counted",
        reached=None if deviation is None else abs(deviation) <= 2,
        command=_COMMAND,
        details={"step_ms": one["step_time_ms_p50"], "counted": counted, "levels": levels, "method": method},
    )


def _free(one: Mapping[str, Any]) -> float:
    """Times as fast a step if what crosses the link at its rate took no time: what no compressor exceeds."""
    step = one["step_time_ms_p50"]
    wire = 8e3 * between_hosts(one) / rate_bits_per_s(one["link_rate"])
    return float(step / max(step - wire, 1e-9))


def _against(
    records: Path, runs: Mapping[str, Any], method: str, rival: str, fewer: float, faster: float | None
) -> None:
    own, other = runs[method], runs[rival]
    pairs = {"bytes": (between_hosts(other) / between_hosts(own), fewer, "times fewer bytes between hosts")}
    speed = other["step_time_ms_p50"] / own["step_time_ms_p50"]
    pairs["step"] = (speed, faster or 0.0, f"times as fast a step (were nothing sent: {_free(other):.2f})")
    for name, (value, least, what) in pairs.items():
        figures.append(
            records,
            figure=f"{name}-{method}-over-{rival}",
            what=f"{what}: `{method}` over `{rival}`, two hosts of two ranks at {own['link_rate']}",
            value=value,
            unit="×",
            target=f"≥ {least:g} ×" if least else "report",
            reached=value >= least if least else None,
            command=_COMMAND,
        )
