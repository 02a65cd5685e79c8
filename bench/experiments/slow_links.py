"""What slow links cost and what compression gives back: three sweeps between two emulated hosts, and their figures.

The sweeps are those of `configs/bench`; what is finished in a `--folder` is not run again.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.experiments.runs import claim, sweep
from bench.network import bounds
from bench.tables import figures
from common.records import record

RECORDS = "links.jsonl"
SWEEPS = ("links", "both_ways", "time_to_target")
_COMMAND = "python -m bench experiment slow_links"
_MODEL_TOLERANCE = 0.15
_TARGET_PPL = 620
Runs = Mapping[tuple[str, str], Mapping[str, Any]]


def run(records: Path, folder: Path) -> None:
    """Run the sweeps, keep their records and append the figures.

    Raises:
        ValueError: Links cannot be emulated here, or the folder is one that ``claim`` refuses.
    """
    claim(folder)
    links, both_ways, time_to_target = (_kept(sweep(name, folder), records) for name in SWEEPS)
    _model(records, _by_axes(links, "network"))
    _both_ways(records, _by_axes(both_ways, "network"))
    _target(records, _by_axes(time_to_target, "seed"))


def _kept(runs: list[dict[str, Any]], records: Path) -> list[dict[str, Any]]:
    """The runs with their bounds; as they are, they stand among the experiment's records too, for `bench report`."""
    found = record.read(records)[0] if records.exists() else []
    known = {(one["sweep_key"], one["date"]) for one in found if "sweep_key" in one}
    for one in runs:
        if (one["sweep_key"], one["date"]) not in known:
            record.append(records, one)
    return bounds.annotate(runs)


def _by_axes(runs: Sequence[Mapping[str, Any]], axis: str) -> Runs:
    return {(one["axes"][axis], one["axes"]["method"]): one for one in runs}


def _model(records: Path, runs: Runs) -> None:
    """Measured steps against compute + encode + bytes over rate + decode, link by link."""
    for network in dict.fromkeys(network for network, _ in runs if network != "alone"):
        ratios = {
            method: one["limits"]["measured_over_model"] for (place, method), one in runs.items() if place == network
        }
        deviations = {method: 100 * abs(ratio - 1) for method, ratio in ratios.items()}
        near = sum(deviation <= 100 * _MODEL_TOLERANCE for deviation in deviations.values())
        figures.append(
            records,
            figure=f"step-model-{network}",
            what=f"methods whose step at {network} is within 15 % of compute + encode + bytes/rate + decode "
            f"(median of measured / model: {statistics.median(ratios.values()):.2f})",
            value=100 * near / len(ratios),
            unit=f"% of {len(ratios)} methods",
            target="100 %, or the difference explained",
            reached=near == len(ratios),
            command=_COMMAND,
            details={"measured_over_model": ratios},
        )
        for operation, field in (("all_gather", "bytes_parameters_total"), ("all_to_all", "bytes_compressed_total")):
            one = runs[network, "none_a2a"]
            ideal_ms = one[field] / (bounds.bandwidth(one) or 1) * 1e3
            figures.append(
                records,
                figure=f"wire-{operation}-{network}",
                what=f"time of `{operation}` at {network} over its bytes/rate, waiting for the other rank included "
                "(`none_a2a`: parameters as they are, gradients through an exchange)",
                value=one["comm_time_ms_by_op"][operation] / ideal_ms,
                unit="× bytes/rate",
                target="report",
                reached=None,
                command=_COMMAND,
            )


def _both_ways(records: Path, runs: Runs) -> None:
    """Speed-up per step over uncompressed full sharding, at each rate, and the two that were asked for."""
    networks = list(dict.fromkeys(network for network, _ in runs if network != "alone"))
    for network in networks:
        step = {method: one["step_time_ms_p50"] for (place, method), one in runs.items() if place == network}
        share = 100 * runs[network, "none"]["limits"]["communication_share"]
        for method in step:
            spread = bounds.noise(runs[network, method])
            figures.append(
                records,
                figure=f"speedup-{method}-{network}",
                what=f"step at {network} with `{method}`: speed-up over uncompressed full sharding, which spends "
                f"{share:.0f} % of its step on communication",
                value=step["none"] / step[method],
                spread=spread * step["none"] / step[method],
                unit="×",
                target="report",
                reached=None,
                command=_COMMAND,
                details={
                    "method": f"`{method}`",
                    "network": network,
                    "step_ms": step[method],
                    "over_none_a2a": step["none_a2a"] / step[method],
                    "communication_share_of_none": share,
                },
            )
    shares = {network: runs[network, "none"]["limits"]["communication_share"] for network in networks}
    bound = [network for network in networks if shares[network] >= 0.9] or [max(shares, key=shares.__getitem__)]
    for rival, least in (("none", 2.5), ("bf16_both", 1.3)):
        found = {n: runs[n, rival]["step_time_ms_p50"] / runs[n, "int8_both"]["step_time_ms_p50"] for n in bound}
        worst = min(found, key=found.__getitem__)
        figures.append(
            records,
            figure=f"int8-both-ways-over-{rival}",
            what=f"int8 gradients and parameters over `{rival}` at {worst}, where the uncompressed step is "
            f"{100 * shares[worst]:.0f} % communication (least of {', '.join(bound)})",
            value=found[worst],
            unit="×",
            target=f"≥ {least} × where communication is ≥ 90 %",
            reached=found[worst] >= least and shares[worst] >= 0.9,
            command=_COMMAND,
            details={"by_network": found, "communication_share_of_none": shares},
        )


def _target(records: Path, runs: Runs) -> None:
    """Training time to the target perplexity, and the best method against the baseline; read off validation curves."""
    times: dict[str, dict[str, float | None]] = {}
    for (seed, method), one in runs.items():
        reached = (point["train_s"] for point in one["val_curve"] if point["val_ppl"] <= _TARGET_PPL)
        times.setdefault(method, {})[seed] = next(reached, None)
    rate = next(iter(runs.values()))["link_rate"]
    complete: dict[str, float] = {}
    for method, by_seed in times.items():
        found = [seconds for seconds in by_seed.values() if seconds is not None]
        if len(found) == len(by_seed):
            complete[method] = statistics.mean(found)
        figures.append(
            records,
            figure=f"time-to-target-{method}",
            what=f"training time to a perplexity of {_TARGET_PPL} at {rate} with `{method}`, "
            f"{len(found)} of {len(by_seed)} seeds (mean ± sd)",
            value=complete.get(method),
            spread=figures.spread(found) if method in complete else None,
            unit="s",
            target="report",
            reached=None,
            command=_COMMAND,
            details={"seconds": by_seed},
        )
    best = min(complete, key=complete.__getitem__)
    pairs = [(times["none"][seed], times[best][seed]) for seed in times[best]]
    gains = [none / own for none, own in pairs if none is not None and own is not None]
    figures.append(
        records,
        figure="time-to-target-gain",
        what=f"the same: uncompressed over the best method, `{best}` (mean ± sd of the paired ratio)",
        value=statistics.mean(gains),
        spread=figures.spread(gains),
        unit="×",
        target="> 1 ×",
        reached=min(gains) > 1,
        command=_COMMAND,
        details={"by_seed": gains},
    )
