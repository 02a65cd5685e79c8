"""A run told in a text file: what was said, and the metrics as they were logged."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

_SAYS = ("lightning.pytorch", "lightning.fabric")  # whose messages are the run's


class RunLog(Callback):
    """Writes ``run.log`` beside the logs of the first logger: messages of the run, and a line of metrics whenever they
    are logged and after every validation. A resumed run goes on in the same file where its logger does.

    Without a logger there is no place beside logs, and nothing is written.
    """

    def __init__(self) -> None:
        self._file: logging.Handler | None = None
        self._step = 0  # the last that was written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file; on the first rank."""
        folder = trainer.log_dir if trainer.loggers else None  # a collective: every rank must ask
        if folder is None or not trainer.is_global_zero or self._file is not None:
            return
        path = Path(folder) / "run.log"
        try:  # an error on this rank alone would leave the others waiting
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            rank_zero_warn(f"{path} cannot be written ({error}): the run has no log file")
            return
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
        formatter.converter = time.gmtime
        self._file.setFormatter(formatter)
        for name in _SAYS:
            logging.getLogger(name).addHandler(self._file)
        self._write(f"{_word(stage)}: {type(pl_module).__name__} on {trainer.world_size} ranks")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write what a step has logged, every ``log_every_n_steps``."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if every and step != self._step and step % every == 0:  # micro-batches are no steps
            self._step = step
            self._metrics(f"step {step}", trainer.callback_metrics, "train/")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the validation found."""
        if not trainer.sanity_checking:
            self._metrics(f"validation at step {trainer.global_step}", trainer.callback_metrics, "val/")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what ended the run; nothing is torn down after that."""
        self._close(f"{type(exception).__name__}: {exception}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        self._close(f"{_word(stage)} ended at step {trainer.global_step}")

    def _close(self, line: str) -> None:
        if self._file is None:
            return
        self._write(line)
        for name in _SAYS:
            logging.getLogger(name).removeHandler(self._file)
        self._file.close()
        self._file = None

    def _metrics(self, when: str, metrics: Mapping[str, Any], kind: str) -> None:
        mine = {name.removeprefix(kind): float(value) for name, value in metrics.items() if name.startswith(kind)}
        told = [f"{name} {value:.6g}" for name, value in mine.items()]
        if told:
            self._write(f"{when}: {', '.join(told)}")

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.emit(logging.makeLogRecord({"msg": line}))


def _word(stage: str) -> str:
    """Lightning's stages are an enumeration of words."""
    return str(getattr(stage, "value", stage))
