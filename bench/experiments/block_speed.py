"""Block sparsity: time and memory of scoring and demotion, and speed of products with packed weights."""

from pathlib import Path

from bench.experiments.runs import json_lines, say
from bench.tables import figures

SIZE, REPEATS = 4096, 9
COMMAND = "python -m bench experiment block_speed --records runs/block_sparsity.jsonl"
WHAT = {1: "decode, batch 1", 8: "decode, batch 8", 64: "decode, batch 64", 512: "prefill, 512 tokens"}


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    say(f"timing one iteration and products of {SIZE}×{SIZE}")
    (found,) = json_lines("callbacks.block_timing", str(SIZE), str(REPEATS), log=folder / "block_timing.log")
    demotion = found["demotion"]
    matrix = f"scoring and demotion of a {SIZE}×{SIZE} matrix (second iteration of the schedule)"
    rows: list[tuple[str, str, float, str, str, bool | None]] = [
        (
            "demotion-loop",
            f"{matrix}, faster than a loop over blocks that uses tensor operations in each",
            demotion["over_loop"],
            "×",
            "≥ 100×",
            demotion["over_loop"] >= 100,
        ),
        ("demotion-floor", f"{matrix}, time over reading the matrix once", demotion["over_read"], "×", "report", None),
        (
            "demotion-memory",
            f"{matrix}, peak extra memory over the matrix",
            demotion["extra_memory"],
            "×",
            "≤ 2×",
            demotion["extra_memory"] <= 2,
        ),
    ]
    for name, what, value, unit, target, reached in rows:
        figures.append(
            records,
            figure=name,
            what=what,
            value=value,
            unit=unit,
            target=target,
            reached=reached,
            command=COMMAND,
            details=demotion,
        )
    for product in found["products"]:
        for arm, speed in product["speed"].items():
            bound = product["bound"][arm]
            figures.append(
                records,
                figure=f"product-{arm.replace(' ', '-')}-{product['rows']}",
                what=f"{WHAT[product['rows']]}: {arm} weights, 41.7 % zeros, over masked dense "
                f"(bound by bytes {bound:.2f}×)",
                value=speed["ratio"],
                spread=speed["spread"],
                unit="×",
                target="report",
                reached=None,
                command=COMMAND,
                details={"device": found["device"], "bound": bound, "dense_ms": product["dense_ms"]},
            )
