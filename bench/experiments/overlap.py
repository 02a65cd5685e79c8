"""How much of the communication hides behind the backward pass, and what that does to a step: DDP's reductions in a
thread of their own against in turn, read from profiler traces. Two emulated hosts; what is finished in a `--folder` is
not run again.
"""

import sys
from pathlib import Path

from bench.experiments.runs import claim, once
from bench.tables import figures

RECORDS = "compression.jsonl"
_CONFIG, _COMMAND, _RATE = "configs/bench/base.yaml", "python -m bench experiment overlap", "100mbit"
_ARGUMENTS = [
    *("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.max_steps", "24"),
    *("--trainer.limit_val_batches", "0", "--model.config", "{n_layer: 8, n_embd: 256, n_head: 4}"),
    *("--trainer.strategy.class_path", "CompressedDDP", "--trainer.strategy.bucket_cap_mb", "2"),
    "--trainer.callbacks+=Trace",
]


def run(records: Path, folder: Path) -> None:
    """Run either way with codes and without, and append the figures.

    Raises:
        ValueError: A folder that ``claim`` refuses.
    """
    claim(folder)
    link = [sys.executable, "-m", "bench", "link", "--rate", _RATE, "--"]
    for method in ("NoCompression", "Int8"):
        found = {}
        for overlap in ("false", "true"):
            arguments = [*_ARGUMENTS, "--trainer.strategy.compressor", method, "--trainer.strategy.overlap", overlap]
            found[overlap] = once(folder / f"{method}-{overlap}", "fit", _CONFIG, *arguments, prefix=link)
        before, after = (100 * found[overlap]["overlap_ratio"] for overlap in ("false", "true"))
        steps = [found[overlap]["step_time_ms_p50"] for overlap in ("false", "true")]
        figures.append(
            records,
            figure=f"overlap-{method.lower()}",
            what=f"communication that hides behind compute under DDP with `{method}` at {_RATE}, reductions in a "
            f"thread ({before:.0f} % in turn; a step is {steps[0] / steps[1]:.2f} × as fast)",
            value=after,
            unit="%",
            target="more than in turn",
            reached=after > before,
            command=_COMMAND,
            details={"in turn": before, "step_ms": steps, "method": method},
        )
