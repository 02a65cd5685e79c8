"""Physical limits of a run's step time: what computing alone takes, and what its bytes take on the wire.

With compute time C (forward, backward, optimizer; no communication, no codec), bytes B sent by a rank in a step, and
bandwidth W, a step that does nothing else takes

    C + B/W     when nothing overlaps,
    max(C, B/W) when everything does,

and the best that any compressor could do, sending nothing at all and costing nothing, is C. A measurement below
max(C, B/W) by more than its noise cannot be right.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.network.link import rate_bits_per_s
from common.tables import Table

Record = Mapping[str, Any]
# What must agree for one run's compute time to be another's.
_SAME_WORK = ("model", "model_parameters", "max_length", "batch_size", "accumulate_grad_batches", "precision")
_MIN_NOISE = 0.05  # of a step; a median of a few hundred steps on a shared machine repeats no better


@dataclass(frozen=True)
class Bounds:
    """Limits of one run, in ms; None where the record does not say enough.

    Attributes:
        compute_ms: Median step without communication and without encoding and decoding.
        compute_from: Name of the one-rank run it was measured in; empty when it is this run's own step minus its
            communication, encoding and decoding.
        codec_ms: Encoding and decoding in a step.
        wire_ms: Bytes of a step over bandwidth.
        parameter_wire_ms: The part of `wire_ms` that gathers parameters.
        measured_ms: Median step; modelled where the run's link was.
        noise: Relative spread of the measurements, (p90 − p50) / p50, at least 0.05.
    """

    compute_ms: float | None
    compute_from: str
    codec_ms: float | None
    wire_ms: float | None
    parameter_wire_ms: float | None
    measured_ms: float | None
    noise: float

    @property
    def serial_ms(self) -> float | None:
        """Ideal step in which nothing overlaps: compute and wire."""
        return _sum(self.compute_ms, self.wire_ms)

    @property
    def overlapped_ms(self) -> float | None:
        """Ideal step in which communication hides behind compute or the other way round."""
        return None if self.compute_ms is None or self.wire_ms is None else max(self.compute_ms, self.wire_ms)

    @property
    def modelled_ms(self) -> float | None:
        """Step without overlap: compute, encode, bytes over bandwidth, decode."""
        return _sum(self.serial_ms, self.codec_ms)

    @property
    def measured_over_model(self) -> float | None:
        """How far the measured step is from the modelled one; above 1 where directions of the wire take turns."""
        return _ratio(self.measured_ms, self.modelled_ms)

    @property
    def communication_share(self) -> float | None:
        """Share of the measured step that is neither computing nor encoding and decoding."""
        busy = _sum(self.compute_ms, self.codec_ms)
        return None if busy is None or not self.measured_ms else 1 - busy / self.measured_ms

    @property
    def best_speedup(self) -> float | None:
        """How many times faster the step could be if nothing at all were sent."""
        return _ratio(self.measured_ms, self.compute_ms)

    @property
    def best_gradient_speedup(self) -> float | None:
        """The same if only gradients were free, and parameters still gathered as they are, without overlap."""
        return _ratio(self.measured_ms, _sum(self.compute_ms, self.parameter_wire_ms))


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _per_step(record: Record, field: str) -> float | None:
    total, steps = record.get(field), record.get("steps_measured")
    return None if total is None or not steps else total / steps


def sent_per_step(record: Record) -> float | None:
    """Bytes a rank sends in a step, gradients and parameters; None where they were not counted."""
    return _sum(_per_step(record, "bytes_compressed_total"), _per_step(record, "bytes_parameters_total"))


def leaving_per_step(record: Record) -> float | None:
    """Bytes that pass a host's link in a step: what a rank sends, or several ranks to other hosts.

    None where they were not counted: where a host has several ranks, what knows no levels tells what it sends, not how
    much of that leaves the host.
    """
    ranks = record.get("ranks_per_host") or 1
    if ranks == 1:
        return sent_per_step(record)
    levels, sent = record.get("bytes_by_level") or {}, sent_per_step(record)
    steps = record.get("steps_measured")
    if sent is None or not steps or sum(levels.values()) / steps < 0.999 * sent:  # a part has no level
        return None
    return ranks * float(levels.get("inter", 0)) / steps


def modelled_step_ms(record: Record, bits_per_s: float) -> float | None:
    """Step time on a link of another rate: the median step without its communication, and bytes over rate.

    Encoding and decoding are part of the step; nothing overlaps, as on CPU, where gloo blocks.

    Args:
        record: A run record.
        bits_per_s: The link's rate.

    Returns:
        Milliseconds; None when the record lacks bytes or communication time, or where reductions overlap backward.
    """
    if record.get("overlaps"):  # how much of the communication the step has waited for is not known
        return None
    sent, step = leaving_per_step(record), record.get("step_time_ms_p50")
    wire = _per_step(record, "comm_time_ms_total")
    if sent is None or step is None or wire is None:
        return None
    return step - wire + sent * 8e3 / bits_per_s


def noise(record: Record) -> float:
    """Relative spread of a run's step times: (p90 − p50) / p50, at least 0.05."""
    p50, p90 = record.get("step_time_ms_p50"), record.get("step_time_ms_p90")
    return max(_MIN_NOISE, (p90 - p50) / p50) if p50 and p90 else _MIN_NOISE


def _work(record: Record) -> str:
    """What a rank did and on which machine, as a key."""
    machine = {key: value for key, value in (record.get("machine") or {}).items() if key != "torch_threads"}
    return json.dumps([*(record.get(field) for field in _SAME_WORK), machine], sort_keys=True)


def _single_ranks(records: Iterable[Record]) -> dict[str, Record]:
    """Runs whose step is compute alone, by their `_work`; of several the one with the steadiest steps."""
    found: dict[str, Record] = {}
    for one in records:
        if one.get("kind", "run") == "run" and one.get("world_size") == 1 and one.get("step_time_ms_p50") is not None:
            work = _work(one)
            if work not in found or noise(one) < noise(found[work]):
                found[work] = one
    return found


def bandwidth(record: Record) -> float | None:
    """Bytes per second of the link a run used, or was modelled on; None without one."""
    rate = record.get("link_rate")
    return rate_bits_per_s(rate) / 8 if rate else None


def bounds(record: Record, records: Iterable[Record] = (), bytes_per_s: float | None = None) -> Bounds:
    """Limits of a run.

    Args:
        record: The run.
        records: Runs among which one of the same work on one rank is looked for: its step is the compute time.
        bytes_per_s: Bandwidth between ranks; by default that of the link in the record.
    """
    return _limits(record, _single_ranks(records), bytes_per_s)


def _limits(record: Record, single_ranks: Mapping[str, Record], bytes_per_s: float | None) -> Bounds:
    speed = bytes_per_s or bandwidth(record)
    parts = (_per_step(record, "compress_time_ms"), _per_step(record, "decompress_time_ms"))
    codec, step = _sum(*parts), record.get("step_time_ms_p50")
    single = single_ranks.get(_work(record))
    if single is not None:
        compute: float | None = single["step_time_ms_p50"]
    else:
        spent = _sum(_per_step(record, "comm_time_ms_total"), codec)
        # where communication overlaps compute the rest of the step says too little about compute, but never too much
        compute = None if step is None or spent is None else max(step - spent, 0.0)

    alone = (record.get("ranks_per_host") or 1) == 1

    def wire(nbytes: float | None) -> float | None:
        return None if nbytes is None or not speed else nbytes / speed * 1e3

    return Bounds(
        compute_ms=compute,
        compute_from=str(single.get("run_name")) if single is not None else "",
        codec_ms=codec,
        wire_ms=wire(leaving_per_step(record)),
        parameter_wire_ms=wire(_per_step(record, "bytes_parameters_total")) if alone else None,
        measured_ms=record.get("step_time_ms_modelled") if record.get("link_emulated") is False else step,
        noise=max(noise(record), noise(single) if single is not None else 0.0),
    )


def suspicions(record: Record, limits: Bounds) -> list[str]:
    """What in a record cannot be, given its limits and their noise; empty when all is plausible."""
    found = []
    share, step = 1 - limits.noise, limits.measured_ms
    if step is not None and limits.wire_ms is not None and step < limits.wire_ms * share:
        found.append(f"step of {step:.1f} ms, but its bytes alone take {limits.wire_ms:.1f} ms on the link")
    if step is not None and limits.compute_ms is not None and limits.compute_from and step < limits.compute_ms * share:
        found.append(f"step of {step:.1f} ms, but {limits.compute_from} computes for {limits.compute_ms:.1f} ms")
    counted, seen = record.get("bytes_compressed_total"), record.get("bytes_nic_total")
    # on one machine the interface counts all ranks' bytes, which only makes it more
    if (
        counted is not None
        and seen is not None
        and (record.get("ranks_per_host") or 1) == 1  # else what stays inside a host does not pass it
        and seen < 0.99 * (counted + (record.get("bytes_parameters_total") or 0))
    ):
        found.append(f"{counted:,} gradient bytes counted, but the interface sent only {seen:,} in all")
    return found


def annotate(records: Sequence[Record], bytes_per_s: float | None = None) -> list[dict[str, Any]]:
    """Copies of the records; runs with `bound_step_time_ms` (ideal step without overlap), `limits` and `suspicious`."""
    result, single_ranks = [], _single_ranks(records)
    for one in records:
        copy = dict(one)
        if one.get("kind", "run") == "run":
            limits = _limits(one, single_ranks, bytes_per_s)
            found = [*(one.get("suspicious") or []), *suspicions(one, limits)]
            copy["bound_step_time_ms"] = limits.serial_ms
            copy["limits"] = {
                "measured_ms": limits.measured_ms,
                "model_ms": limits.modelled_ms,
                "measured_over_model": limits.measured_over_model,
                "communication_share": limits.communication_share,
            }
            copy["suspicious"] = list(dict.fromkeys(found)) or None
        result.append(copy)
    return result


def table(records: Sequence[Record], bytes_per_s: float | None = None) -> Table:
    """Limits of all runs beside what was measured.

    Raises:
        ValueError: There is no run among the records.
    """
    headers = ["run", "compute (ms)", "compute from", "encode + decode (ms)", "bytes/bandwidth (ms)", "ideal step (ms)"]
    headers += ["ideal, overlapped (ms)", "measured (ms)", "measured / model", "best speed-up", "gradients only"]
    rows, single_ranks = [], _single_ranks(records)
    for one in records:
        if one.get("kind", "run") != "run":
            continue
        limits = _limits(one, single_ranks, bytes_per_s)
        found = [limits.compute_ms, limits.compute_from or "own step", limits.codec_ms, limits.wire_ms]
        found += [
            limits.serial_ms,
            limits.overlapped_ms,
            limits.measured_ms,
            limits.measured_over_model,
        ]
        found += [limits.best_speedup, limits.best_gradient_speedup]
        rows.append([one.get("run_name"), *found, suspicions(one, limits)])
    if not rows:
        raise ValueError("no run among the records")
    return Table([*headers, "suspicious"], rows)
