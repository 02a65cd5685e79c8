"""What the hook and the traffic monitor cost: interleaved runs with and without, on one machine."""

import re
import subprocess
import sys
from pathlib import Path

from bench.experiments.runs import ROOT, fit, say
from bench.tables import figures
from common.measure.timing import ratio_with_spread

RECORDS = "pretraining.jsonl"
REPEATS, STEPS, CONFIG = 4, 40, "configs/pretraining/gpt2_tiny.yaml"
ARMS = {"native": "null", "none": "NoCompression", "none_a2a": "NoCompressionA2A"}
COMMAND = "python -m bench experiment hook_overhead"


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    medians: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(REPEATS):
        for arm, compressor in ARMS.items():
            arguments = ["--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
            arguments += ["--trainer.strategy.compressor", compressor]
            done = fit(folder / f"{arm}-{repeat}", CONFIG, *arguments).record
            medians[arm].append(done["step_time_ms_p50"])
            say(f"{arm}, repeat {repeat + 1}: {medians[arm][-1]:.1f} ms")
    notes = {"none": "same collective, same bytes", "none_a2a": "all-to-all: half of gloo's bytes"}
    for arm, note in notes.items():
        ratio = ratio_with_spread(medians[arm], medians["native"])
        figures.append(
            records,
            figure=f"hook-overhead-{arm}",
            what=f"step time of `{arm}` over FSDP without a hook ({note}), medians of {REPEATS} interleaved runs",
            value=ratio["ratio"],
            spread=ratio["spread"],
            unit="×",
            target="report",
            reached=None,
            command=COMMAND,
            details={"step_ms": medians},
        )
    _monitor(records, done)


def _monitor(records: Path, done: dict) -> None:
    """The monitor's own time per step, which it measures, and that of the counters inside the hooks."""
    setup = "import torch; from strategies.traffic import Traffic; t, d = Traffic(), torch.device('cpu')"
    timed = "with t.timed('unit', 'wire', d, 'all_to_all'): pass"
    timeit = [sys.executable, "-m", "timeit", "-u", "usec", "-n", "2000", "-s", setup, timed]
    text = subprocess.run(timeit, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    each_us = float(re.findall(r"([\d.]+) usec per loop", text)[0])
    # at most: encode, pack, wire and decode, and as many again for parameter gathers, in each of 5 units
    calls = 4 * 2 * 5
    monitor_ms = done["monitor_ms_per_step"] + each_us * calls / 1e3
    share = 100 * monitor_ms / done["step_time_ms_p50"]
    figures.append(
        records,
        figure="monitor-cost",
        what="traffic monitor and counters, share of step time",
        value=share,
        unit="%",
        target="< 1 %",
        reached=share < 1,
        command=COMMAND,
        details={"monitor_ms": done["monitor_ms_per_step"], "timed_us": each_us, "step_ms": done["step_time_ms_p50"]},
    )
