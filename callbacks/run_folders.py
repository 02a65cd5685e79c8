"""A run's folders: one run writes in them at a time, its last checkpoint is found, and its log has no gaps."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.measurement import completes_step
from callbacks.model_card import HFExport
from common.files import recover_all
from common.locks import InUseError, lock
from strategies.checkpoints import SealedCheckpointIO
from strategies.engine import CompressedEngine


class RunFolders(Callback):
    """Holds the folders that ``fit`` writes its checkpoints and its model to; a second run is told who has them.

    Rank 0 holds the locks for all ranks of a run. They are the system's, so none is left when a run is killed. The
    checkpoints of Lightning's own strategies, where they are one file, get a manifest; Pare's engines see to theirs.

    Lightning logs a step after its checkpoint is saved, so that a kill in between would lose that step's row of the
    log. The row goes into the checkpoint, and is the first that a resumed run writes.
    """

    def __init__(self) -> None:
        self._locks = ExitStack()
        self._row: tuple[int, dict[str, Any]] | None = None
        self._restored = False  # a row that this process has not logged

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the locks, before any weight is loaded.

        Raises:
            InUseError: Another run writes in one of the folders; raised on all ranks.
            OSError: One of the folders cannot be made; raised on all ranks.
        """
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO and not isinstance(
            trainer.strategy, CompressedEngine
        ):
            trainer.strategy.checkpoint_io = SealedCheckpointIO()
        if stage != "fit":
            return
        problem: InUseError | OSError | None = None
        if trainer.is_global_zero:
            try:
                for folder in _folders(trainer.callbacks):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    self._locks.enter_context(lock(folder))
            except (InUseError, OSError) as error:  # raised here alone, it would leave the other ranks waiting
                self._locks.close()
                problem = error
        if (problem := trainer.strategy.broadcast(problem)) is not None:
            raise problem

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep what the loggers will be given for this step; checkpoints are saved after this."""
        every = trainer.log_every_n_steps
        if every and completes_step(trainer) and trainer.global_step % every == 0:
            self._row = (trainer.global_step - 1, dict(trainer.logged_metrics))

    def state_dict(self) -> dict[str, Any]:
        """The last row of the log."""
        if self._row is None:
            return {}
        step, metrics = self._row
        return {"step": step, "metrics": {name: float(value) for name, value in metrics.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        if state_dict:
            self._row, self._restored = (state_dict["step"], state_dict["metrics"]), True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the row of the step that the checkpoint was saved at."""
        self._log_row(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where that step was the last: nothing is trained then."""
        self._log_row(trainer)

    def _log_row(self, trainer: Trainer) -> None:
        if self._restored and self._row is not None and self._row[0] == trainer.global_step - 1:
            for logger in trainer.loggers:
                logger.log_metrics(self._row[1], self._row[0])
        self._restored = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the locks back."""
        self._locks.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the locks back: the process may live on."""
        self._locks.close()


def check_callbacks(callbacks: Iterable[Any], command: str, model: Any, data: Any) -> None:
    """Let callbacks refuse what cannot succeed, where they have ``check_arguments(command, model, data)``."""
    for callback in callbacks:
        check = getattr(callback, "check_arguments", None)
        if check is not None:
            check(command, model, data)


def check_apart(trainer: Trainer, command: str, model: Any) -> None:
    """Refuse a folder that would be replaced as a whole while it holds something else that the run writes.

    Raises:
        ValueError: The model's output or the export is or contains another's place.
    """
    if command not in ("fit", "prune", "export"):
        return
    callbacks: list[Any] = list(trainer.callbacks)
    replaced = [("model.output", getattr(model, "output", None))]
    written = [(type(c).__name__ + ".path", c.path) for c in callbacks if hasattr(c, "path")]
    written += [(f"{type(log).__name__}.save_dir", getattr(log, "root_dir", log.save_dir)) for log in trainer.loggers]
    if command == "fit":
        replaced += [("HFExport.dirpath", c.dirpath) for c in callbacks if isinstance(c, HFExport)]
        written += [("ModelCheckpoint.dirpath", c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint)]
    for i, (field, folder) in enumerate(replaced):
        for other, place in [*replaced[:i], *replaced[i + 1 :], *written]:
            if folder is None or place is None or "://" in str(place):
                continue
            inner, outer = Path(place).expanduser().resolve(), Path(folder).expanduser().resolve()
            if inner == outer or outer in inner.parents:
                relation = "is" if inner == outer else "contains"
                raise ValueError(
                    f"{field}: {folder} {relation} {other} ({place}), which would be lost when the folder is replaced; "
                    "choose a folder apart from it"
                )


def _folders(callbacks: Iterable[Callback]) -> list[Path]:
    """Folders of checkpoints and exports; a folder that Lightning chooses itself is new for every run."""
    given = [c.dirpath for c in callbacks if isinstance(c, ModelCheckpoint | HFExport)]
    return sorted({Path(folder).resolve() for folder in given if folder is not None and "://" not in str(folder)})


def to_continue(ckpt_path: str | None, callbacks: Iterable[Any], since: float | None = None) -> str | None:
    """The checkpoint that a command line asks for.

    "last" is the newest ``last.ckpt`` of the callbacks, also where a kill left it under another name (Lightning's own
    search warns where there is none, and trains from scratch). "auto" is the same, or a fresh start where there is
    none yet: for scripts that start again by themselves. Such a script says in ``PARE_STARTED`` when it first started
    (seconds since 1970), so that a checkpoint of an earlier run in the same folder is not taken for this one's, and in
    ``PARE_CKPT_PATH`` what it started from then: as long as the run has saved nothing, it starts from there again.

    Args:
        ckpt_path: What the command line says.
        callbacks: Whose folders are searched.
        since: Pass over older checkpoints, in seconds since 1970; by default, with "auto", ``PARE_STARTED``.

    Raises:
        ValueError: "last", and there is none.
    """
    if ckpt_path not in ("last", "auto"):
        return ckpt_path
    if since is None:
        since = float(os.environ.get("PARE_STARTED") or 0) if ckpt_path == "auto" else 0.0
    found: list[Path] = []
    searched = []
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            folder = Path(callback.dirpath)
            searched.append(str(folder))
            recover_all(folder)
            found += folder.glob(f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}")
    found = [path for path in found if path.exists() and path.stat().st_mtime >= since]
    if not found and ckpt_path == "auto":
        return to_continue(os.environ.get("PARE_CKPT_PATH") or None, callbacks, since=0.0) if since else None
    if not found:
        where = f"in {', '.join(searched)}" if searched else "since no ModelCheckpoint has a dirpath"
        raise ValueError(
            f"ckpt_path: there is no last checkpoint {where}; start without --ckpt_path or with auto, or give the "
            "checkpoint's path"
        )
    return str(max(found, key=lambda path: path.stat().st_mtime))
