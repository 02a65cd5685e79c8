"""A run's folders: one run writes in them at a time, its last checkpoint is found, and its log has no gaps."""

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the locks, before any weight is loaded.

        Raises:
            InUseError: Another run writes in one of the folders; raised on all ranks.
        """
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO and not isinstance(
            trainer.strategy, CompressedEngine
        ):
            trainer.strategy.checkpoint_io = SealedCheckpointIO()
        if stage != "fit":
            return
        problem = None
        if trainer.is_global_zero:
            try:
                for folder in _folders(trainer.callbacks):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    self._locks.enter_context(lock(folder))
            except InUseError as error:
                self._locks.close()
                problem = str(error)
        if (problem := trainer.strategy.broadcast(problem)) is not None:
            raise InUseError(problem)

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
            self._row = (state_dict["step"], state_dict["metrics"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the row of the step that the checkpoint was saved at."""
        if self._row is not None and self._row[0] == trainer.global_step - 1:
            for logger in trainer.loggers:
                logger.log_metrics(self._row[1], self._row[0])

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


def _folders(callbacks: Iterable[Callback]) -> list[Path]:
    """Folders of checkpoints and exports; a folder that Lightning chooses itself is new for every run."""
    given = [c.dirpath for c in callbacks if isinstance(c, ModelCheckpoint | HFExport)]
    return sorted({Path(folder).resolve() for folder in given if folder is not None and "://" not in str(folder)})


def to_continue(ckpt_path: str | None, callbacks: Iterable[Any]) -> str | None:
    """The checkpoint that a command line asks for.

    "last" is the newest ``last.ckpt`` of the callbacks, also where a kill left it under another name (Lightning's own
    search warns where there is none, and trains from scratch). "auto" is the same, or a fresh start where there is
    none yet: for scripts that start again by themselves.

    Raises:
        ValueError: "last", and there is none.
    """
    if ckpt_path not in ("last", "auto"):
        return ckpt_path
    found: list[Path] = []
    searched = []
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            folder = Path(callback.dirpath)
            searched.append(str(folder))
            recover_all(folder)
            found += folder.glob(f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}")
    found = [path for path in found if path.exists()]
    if not found and ckpt_path == "auto":
        return None
    if not found:
        where = f"in {', '.join(searched)}" if searched else "since no ModelCheckpoint has a dirpath"
        raise ValueError(
            f"ckpt_path: there is no last checkpoint {where}; start without --ckpt_path or with auto, or give the "
            "checkpoint's path"
        )
    return str(max(found, key=lambda path: path.stat().st_mtime))
