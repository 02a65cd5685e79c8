"""Local steps with rare meetings: time to a quality over the rate of the link, and quality for the same tokens.

Two sweeps of `configs/bench`; what is finished in a `--folder` is not run again.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.experiments.runs import claim, sweep
from bench.tables import figures

RECORDS = "local_steps.jsonl"
_COMMAND = "python -m bench experiment local_steps"
_TARGETS = {"100mbit": 12, "10mbit": 50}  # times as fast as uncompressed full sharding
_LOSS = 1.0  # % of perplexity
Runs = Sequence[Mapping[str, Any]]


def run(records: Path, folder: Path) -> None:
    """Run the sweeps and append the figures.

    Raises:
        ValueError: Links cannot be emulated here, or the folder is one that ``claim`` refuses.
    """
    claim(folder)
    _times(records, sweep("local_steps", folder))
    _quality(records, sweep("local_quality", folder))


def _times(records: Path, runs: Runs) -> None:
    """Training time to the target perplexity by link and method, and the best local method over none."""
    target = runs[0]["target_ppl"]
    times: dict[str, dict[str, dict[str, float | None]]] = {}
    for one in runs:
        axes = one["axes"]
        by_seed = times.setdefault(axes["network"], {}).setdefault(axes["method"], {})
        by_seed[axes["seed"]] = one.get("time_to_target_ppl_s")
    for network, methods in times.items():
        complete: dict[str, float] = {}
        for method, by_seed in methods.items():
            found = [seconds for seconds in by_seed.values() if seconds is not None]
            if len(found) == len(by_seed):
                complete[method] = statistics.mean(found)
            figures.append(
                records,
                figure=f"time-{network}-{method}",
                what=f"training time to a perplexity of {target} at {network} with `{method}`, "
                f"{len(found)} of {len(by_seed)} seeds (mean ± sd)",
                value=complete.get(method),
                spread=figures.spread(found) if method in complete else None,
                unit="s",
                target="report",
                reached=None,
                command=_COMMAND,
                details={"seconds": by_seed, "method": method, "network": network},
            )
        local = {method: seconds for method, seconds in complete.items() if method.startswith(("local", "streaming"))}
        if "none" in complete and local:
            _gain(records, network, methods, min(local, key=local.__getitem__))


def _gain(records: Path, network: str, methods: Mapping[str, Mapping[str, float | None]], best: str) -> None:
    pairs = [(methods["none"][seed], methods[best][seed]) for seed in methods[best]]
    gains = [none / own for none, own in pairs if none is not None and own is not None]
    least = _TARGETS.get(network)
    figures.append(
        records,
        figure=f"gain-{network}",
        what=f"the same at {network}: uncompressed full sharding over the best local method, `{best}` "
        "(mean ± sd of the paired ratio)",
        value=statistics.mean(gains),
        spread=figures.spread(gains),
        unit="×",
        target="report" if least is None else f"≥ {least} ×",
        reached=None if least is None else statistics.mean(gains) >= least,
        command=_COMMAND,
        details={"by_seed": gains, "network": network},
    )


def _quality(records: Path, runs: Runs) -> None:
    """Final perplexity against a reduction in every step, seed by seed."""
    ppl: dict[str, dict[str, float]] = {}
    for one in runs:
        ppl.setdefault(one["axes"]["method"], {})[one["axes"]["seed"]] = one["val_ppl"]
    for method, by_seed in ppl.items():
        if method == "none":
            continue
        losses = [100 * (value / ppl["none"][seed] - 1) for seed, value in by_seed.items() if seed in ppl["none"]]
        asked = method.startswith(("fp32", "int")) and not method.endswith("256")
        figures.append(
            records,
            figure=f"quality-{method}",
            what=f"perplexity for the same tokens with `{method}` (what is sent, and steps between meetings) against a "
            f"reduction in every step, {len(losses)} seeds (mean ± sd)",
            value=statistics.mean(losses),
            spread=figures.spread(losses),
            unit="%",
            target=f"within {_LOSS:g} %" if asked else "report",
            reached=abs(statistics.mean(losses)) <= _LOSS or statistics.mean(losses) < 0 if asked else None,
            command=_COMMAND,
            details={"by_seed": losses, "ppl": by_seed},
        )
