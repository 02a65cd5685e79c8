"""Memory that it takes to start and train a model of a billion parameters on four ranks: built by rows, and whole.

Memory is the largest sum over all processes that was sampled (PSS). What a start by rows saves is that each rank never
holds the whole model.
"""

from pathlib import Path

from bench.experiments.runs import ROOT, main_py, say
from bench.network.process import run_measured
from bench.tables import figures

RECORDS = "compression.jsonl"
_CONFIG, _COMMAND = "configs/bench/big_start.yaml", "python -m bench experiment big_start"
_GB = 20.0  # which all ranks together may take


def run(records: Path, folder: Path) -> None:
    """Train one step either way, and append the figures."""
    for start in ("sharded", "whole"):
        work = folder / start
        work.mkdir(parents=True, exist_ok=True)
        command = main_py("fit", "--config", str(ROOT / _CONFIG), "--trainer.strategy.start", start)
        environment = {"CI": "true", "PYTHONPATH": str(ROOT)}
        done = run_measured(command, environment, cwd=work, timeout=3600, log=work / "output.log")
        failed = done.returncode != 0
        if failed and start == "sharded":
            raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}\n{done.output}")
        peak = None if done.peak_memory_mb is None else done.peak_memory_mb / 1e3
        say(f"{start}: {peak} GB, {done.wall_s:.0f} s" + (", failed" if failed else ""))
        figures.append(
            records,
            figure=f"big-start-{start}",
            what=f"memory of four ranks that start a model of 1.0 B parameters in bfloat16 ({start}) and train a step"
            + (" (failed)" if failed else ""),
            value=peak,
            unit="GB",
            target=f"≤ {_GB:g} GB" if start == "sharded" else "report",
            reached=None if peak is None or start != "sharded" else peak <= _GB,
            command=_COMMAND,
            details={"seconds": done.wall_s, "memory": done.memory_kind, "exit": done.returncode},
        )
