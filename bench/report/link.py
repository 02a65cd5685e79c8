"""The network a run went over, as its record tells it."""

import re

from bench.network.link import rate_bits_per_s
from bench.report.values import Record, number, quantity, text
from common.tables import NOT_RECORDED

_NODES = re.compile(r"^  num_nodes: ['\"]?(\d+)", re.M)


def link_rate(record: Record) -> float | None:
    """Rate of the link in bit/s; None when the run used none or does not say."""
    try:
        return rate_bits_per_s(str(record.get("link_rate")))
    except ValueError:
        return None


def modelled(record: Record) -> bool:
    """Whether the link was not there: its time is computed from the bytes, not measured."""
    return record.get("link_rate") is not None and record.get("link_emulated") is False


def link_label(record: Record) -> str:
    """Such as "1 Gbit/s, delay 1ms", "100 Mbit/s (modelled)" or "none" (ranks of one machine, or a single one).

    Where the record does not say, its configuration tells how many machines there were.
    """
    if record.get("link_rate") is None:
        nodes = _NODES.search(str(record.get("config") or ""))
        if "link_rate" in record or record.get("world_size") == 1 or (nodes and nodes[1] == "1"):
            return "none"
        return f"between {nodes[1]} machines" if nodes else NOT_RECORDED
    rate = link_rate(record)
    name = quantity(rate, "bit/s") if rate else text(record.get("link_rate"))
    delay = f", delay {text(record['link_delay'])}" if record.get("link_delay") is not None else ""
    return name + delay + (" (modelled)" if modelled(record) else "")


def step_ms(record: Record, statistic: str) -> float | None:
    """Optimizer step time (ms): "mean" or "p50" as measured, or as modelled where the link was not there."""
    return number(record, "step_time_ms_modelled" if modelled(record) else f"step_time_ms_{statistic}")
