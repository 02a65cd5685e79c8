"""Stopping on a signal without losing work, and saying why when another rank is gone."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment

from callbacks.measurement import completes_step

_KEY = "pare/stop_after_step"
_LEAD = {"cpu": 1, "cuda": 20}  # steps between announcing and stopping; see GracefulStop
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Application timeout caused pair closure")


class GracefulStop(Callback):
    """On SIGINT or SIGTERM to any rank, all ranks save a checkpoint at the same step and exit with 128 + signal.

    The rank that got the signal announces a step in the process group's store, which the others look up after each
    step: one small request, no collective, no device synchronisation. The announced step is far enough ahead that no
    rank can have passed it: on CPU a rank is at most one step ahead, because collectives block the host; on CUDA the
    host runs ahead by the launch queue, which holds fewer than 20 steps. A second signal stops at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._announced = False
        self._leaving_for: int | None = None
        self._kept: Path | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals for as long as training runs."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._receive)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._signal = signum

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Announce a stop, or save at the agreed step."""
        if not completes_step(trainer):
            return
        stop = self._agreed_stop(trainer)
        if stop is not None and trainer.global_step >= stop[0]:
            self._save(trainer)
            self._leaving_for = stop[1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave once the saved step has been logged, which comes after ``on_train_batch_end``.

        Raises:
            SystemExit: With 128 + signal.
        """
        if self._leaving_for is not None:
            self._leave(trainer, self._leaving_for)

    def _agreed_stop(self, trainer: Trainer) -> tuple[int, int] | None:
        """The step to stop after and the signal that asked for it."""
        step = trainer.global_step
        if not (dist.is_available() and dist.is_initialized()):
            return (step, self._signal) if self._signal is not None else None
        store = dist.distributed_c10d._get_default_store()
        if self._signal is not None and not self._announced:
            # compare_set: when several ranks get the signal, the first one's step holds for all
            store.compare_set(_KEY, "", f"{step + _LEAD[trainer.strategy.root_device.type]} {self._signal}")
            self._announced = True
        if not store.check([_KEY]):
            return None
        last, signum = store.get(_KEY).decode().split()
        return int(last), int(signum)

    def _save(self, trainer: Trainer) -> None:
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath is not None:
            self._kept = Path(checkpoint.dirpath) / "last.ckpt"
            trainer.save_checkpoint(self._kept)

    def _leave(self, trainer: Trainer, signum: int) -> None:
        if trainer.is_global_zero:
            kept = f"continue with --ckpt_path {self._kept}" if self._kept else "nothing kept: no ModelCheckpoint"
            print(f"stopped by {signal.Signals(signum).name} after step {trainer.global_step}; {kept}", file=sys.stderr)
        trainer.strategy.barrier()
        # Lightning's launcher kills rank 0 when a child it started fails; the children's status is rank 0's to report.
        child = isinstance(trainer.strategy.cluster_environment, LightningEnvironment) and trainer.local_rank > 0
        sys.exit(0 if child else 128 + signum)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the likely cause when a collective fails because another rank is gone."""
        if any(text in str(exception) for text in _LOST_PEER):
            print(
                f"rank {trainer.global_rank}: another rank has died (see its output above, or the kernel log for "
                "out-of-memory kills). Continue from the last complete checkpoint with --ckpt_path last.",
                file=sys.stderr,
                flush=True,
            )
