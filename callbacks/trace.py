"""Profiler traces of a few steps, and what they say about communication."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, schedule

from callbacks.measurement import Measurement, completes_step
from common.trace import summary as trace_summary


class Trace(Measurement):
    """Profiles ``active`` optimizer steps with torch.profiler and summarises rank 0's trace.

    Every rank writes ``trace/rank{r}.pt.trace.json.gz`` in the log folder: open it in Perfetto (ui.perfetto.dev),
    chrome://tracing, or TensorBoard's profiler view (pip install torch-tb-profiler), which finds files of that name.

    Args:
        wait: Optimizer steps before anything is recorded.
        warmup: Steps that run under the profiler and are thrown away.
        active: Steps kept.
    """

    def __init__(self, wait: int = 5, warmup: int = 2, active: int = 3) -> None:
        if active < 1:
            raise ValueError(f"Trace.active must be at least 1, got {active}")
        self.steps = {"wait": wait, "warmup": warmup, "active": active}
        self._profiler: profile | None = None
        self._path: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the profiler's schedule."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank{trainer.global_rank}.pt.trace.json.gz"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(**self.steps, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._save)
        self._profiler.start()

    def _save(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self._path))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Tell the profiler when a step is complete."""
        if self._profiler is not None and completes_step(trainer):
            self._profiler.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, and show the table on rank 0."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self._profiler = None
        if trainer.is_global_zero and self._path is not None and self._path.is_file():
            Console().print(trace_summary.table(trace_summary.summarise(self._path)))

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        if self._path is None or not self._path.is_file():
            return {}
        summary = trace_summary.summarise(self._path)
        return {"trace": summary, "overlap_ratio": summary["overlap_ratio"]}
