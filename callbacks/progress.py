"""Progress for whoever is watching: a bar on a terminal, a line now and then in a log, nothing in CI."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from common.progress import LOG_EVERY_S, duration, unwatched


class Progress(RichProgressBar):
    """Lightning's rich bar with its ETA on a terminal; elsewhere one line with ETA every half minute; quiet in CI."""

    def __init__(self) -> None:
        interactive = sys.stdout.isatty() and not unwatched()
        super().__init__(refresh_rate=1 if interactive else 0)
        self._interactive = interactive
        self._started = self._said = self._train_started = 0.0
        self._first_step = self._done = 0

    # ---- the bar ----------------------------------------------------------------------------------------------

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of this epoch; see ``ProgressBar.total_train_batches``, which takes steps for micro-batches."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        batches, done = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.completed
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(batches, left + (done if done < batches else 0))  # when an epoch begins, the counts are the last's

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning counts from 0 and shows "0/-2" where only steps are limited
        epochs = self.trainer.max_epochs
        of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        return f"{f'Epoch {current_epoch + 1}{of}':{len(self.validation_description)}}"

    # ---- lines in a log ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._started = self._said = time.monotonic()
        self._done = 0

    def _due(self, trainer: Trainer) -> bool:
        """Whether it is time for a line."""
        now = time.monotonic()
        if self._interactive or unwatched() or not trainer.is_global_zero or now - self._said < LOG_EVERY_S:
            return False
        self._said = now
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock for the ETA."""
        super().on_train_start(trainer, pl_module)
        self._begin()
        self._train_started = self._started
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say where training stands, when there is no bar to show it."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if not self._due(trainer):
            return
        total, done = trainer.estimated_stepping_batches, trainer.global_step
        pace = (time.monotonic() - self._train_started) / max(done - self._first_step, 1)
        left = f", {duration((total - done) * pace)} left" if total != float("inf") else ""
        loss = trainer.callback_metrics.get("train/loss")
        shown = f", loss {float(loss):.3f}" if loss is not None else ""
        print(f"step {done}/{total}{shown}, {pace:.2f} s/step{left}", flush=True)

    def _batch_done(self, trainer: Trainer, what: str, batches: list[int | float]) -> None:
        """Say where a loop over batches stands, and how long it will take."""
        self._done += 1
        if self._due(trainer):
            total, pace = sum(batches), (time.monotonic() - self._started) / self._done
            left = f", {duration((total - self._done) * pace)} left" if total != float("inf") else ""
            print(f"{what}: batch {self._done}/{total}{left}", flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock for the ETA."""
        super().on_validation_start(trainer, pl_module)
        self._begin()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say where validation stands."""
        super().on_validation_batch_end(trainer, pl_module, *args)
        self._batch_done(trainer, "validation", list(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock for the ETA."""
        super().on_test_start(trainer, pl_module)
        self._begin()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say where testing stands."""
        super().on_test_batch_end(trainer, pl_module, *args)
        self._batch_done(trainer, "test", list(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock for the ETA."""
        super().on_predict_start(trainer, pl_module)
        self._begin()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say where prediction stands."""
        super().on_predict_batch_end(trainer, pl_module, *args)
        self._batch_done(trainer, "predict", list(trainer.num_predict_batches))
