"""What each method costs in perplexity, alone and under error feedback: `configs/bench/quality.yaml` on books."""

import statistics
from pathlib import Path

from bench.experiments.runs import BOOKS, books_beside, claim, sweep
from bench.tables import figures

RECORDS = "quality.jsonl"
_COMMAND = "python -m bench experiment method_quality"
_FINE = ("bf16", "fp16", "fp8", "int8")  # of 16 or 8 bits, rounding to nearest
_FEEDBACK = "ef_"


def run(records: Path, folder: Path) -> None:
    """Run the sweep, what is finished in a `--folder` excepted, and append a figure a method.

    Raises:
        ValueError: The folder is one that ``claim`` refuses.
    """
    data = books_beside()
    claim(folder, BOOKS / "train.json", BOOKS / "valid.json")
    ppl: dict[str, dict[str, float]] = {}
    bits: dict[str, float] = {}
    for one in sweep("quality", folder, *data):
        method = one["axes"]["method"]
        ppl.setdefault(method, {})[one["axes"]["seed"]] = one["val_ppl"]
        bits[method] = 32 / one["compression_ratio"]
    changes = {
        method: [100 * (value / ppl["none"][seed] - 1) for seed, value in found.items()]
        for method, found in ppl.items()
    }
    for method, found in ppl.items():
        figures.append(
            records,
            figure=f"quality-{method}",
            what=f"validation perplexity with `{method}` over `none`, {len(found)} seeds (mean ± sd of the paired "
            "change)",
            value=statistics.mean(changes[method]),
            spread=figures.spread(changes[method]),
            unit="%",
            target="within 1 %" if method.removeprefix(_FEEDBACK) in _FINE else "report",
            reached=abs(statistics.mean(changes[method])) <= 1 if method.removeprefix(_FEEDBACK) in _FINE else None,
            command=_COMMAND,
            details={
                "method": f"`{method.removeprefix(_FEEDBACK)}`",
                "feedback": "with error feedback" if method.startswith(_FEEDBACK) else "alone",
                "val_ppl": statistics.mean(found.values()),
                "val_ppl_sd": figures.spread(list(found.values())),
                "bits_per_element": bits[method],
                "change_percent": changes[method],
            },
        )
