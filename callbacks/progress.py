"""Progress for whoever is watching: a bar on a terminal, a line now and then in a log, nothing in CI."""

import os
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_LOG_EVERY_S = 30.0


class Progress(RichProgressBar):
    """Lightning's rich bar with its ETA on a terminal; elsewhere one line with ETA every half minute; quiet in CI."""

    def __init__(self) -> None:
        interactive = sys.stdout.isatty() and not os.environ.get("CI")
        super().__init__(refresh_rate=1 if interactive else 0)
        self._interactive = interactive
        self._started = self._said = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock for the ETA."""
        super().on_train_start(trainer, pl_module)
        self._started = self._said = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say where training stands, when there is no bar to show it."""
        super().on_train_batch_end(trainer, pl_module, *args)
        now = time.monotonic()
        if self._interactive or os.environ.get("CI") or not trainer.is_global_zero or now - self._said < _LOG_EVERY_S:
            return
        self._said = now
        total, done = trainer.estimated_stepping_batches, trainer.global_step
        pace = (now - self._started) / max(done - self._first_step, 1)
        left = f", {(total - done) * pace / 60:.1f} min left" if total != float("inf") else ""
        loss = trainer.callback_metrics.get("train/loss")
        shown = f", loss {float(loss):.3f}" if loss is not None else ""
        print(f"step {done}/{total}{shown}, {pace:.2f} s/step{left}", flush=True)
