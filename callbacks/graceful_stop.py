"""Stopping by signal: a training run saves on all ranks at one step, everything else ends where it is.

Exit codes, of every command: 130 after SIGINT (Ctrl-C), 143 after SIGTERM; that is 128 + signal, as shells count.
"""

import itertools
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.measurement import completes_step
from strategies.checkpoints import peer_lost

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# By which a rank and the one that launched it tell each other: sent as it came, a signal may be the other's second.
_PASSED_ON = {signal.SIGRTMIN + signum: signum for signum in SIGNALS}
_runs = itertools.count()
_PARENT = "PARE_PARENT"
_END = b"\0"
_DEAF_S = 15.0  # after which a process that does not come to hear of a signal is ended
_AHEAD = 2  # steps that the host may be ahead of a CUDA device
_LEAD = {"cpu": 1, "cuda": _AHEAD + 1}  # steps between announcing and stopping; see GracefulStop


class Stopped(SystemExit):
    """A signal ends this process; files half written are removed on the way out.

    Its code is 128 + signal. A rank that Lightning's launcher started exits with 0: the launcher kills rank 0 when a
    child fails, and the run's status is rank 0's to report.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(0 if _started_by_a_rank() else 128 + signum)
        self.signum = signum
        self.told = f"stopped by {signal.Signals(signum).name}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM raise `Stopped` wherever the program is; a second one ends it at once.

    Python runs handlers between its own instructions. A rank that waits in torch for others to come to the meeting does
    not get there, for up to half an hour; then a signal ends it after `_DEAF_S` seconds.
    """
    before, previous = os.environ.get(_PARENT), _take(_stop_now)
    previous |= {signum: signal.signal(signum, _launched_rank_stopped) for signum in _PASSED_ON}
    if not _started_by_a_rank():
        os.environ[_PARENT] = str(os.getpid())  # ranks that this process launches inherit it
    try:
        with _heard():
            yield
    finally:
        os.environ.pop(_PARENT)
        if before is not None:
            os.environ[_PARENT] = before
        for signum, handler in previous.items():
            # a rank that was told to stop still answers: that must not kill the one which told it, on its way out
            late = signum in _PASSED_ON and handler is signal.SIG_DFL
            signal.signal(signum, signal.SIG_IGN if late else handler)


class GracefulStop(Callback):
    """On SIGINT or SIGTERM to any rank, all ranks save a checkpoint at the same step and exit with 128 + signal.

    The rank that got the signal announces a step in the process group's store, which the others look up after each
    step: one small request, no collective, no device synchronisation. The announced step is far enough ahead that no
    rank can have passed it: on CPU a rank is at most one step ahead, because collectives block the host; on CUDA, where
    only the device waits for other ranks, the host waits until its device is at most two steps behind. Batches of a
    validation during training are steps of their own, and a barrier ends it: ranks whose validation has no collectives
    may have finished theirs. A second signal stops at once, and so does the first where nothing is trained
    (`validate`, `predict`, …).
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._run = 0
        self._announced: set[str] = set()
        self._leaving_for: int | None = None
        self._kept: Path | None = None
        self._validated = 0
        self._launched: deque[Any] = deque()  # an event for each step that the device may not have finished

    # ---- who listens to the signals ---------------------------------------------------------------------------

    # Lightning's own handler of SIGTERM calls a collective from inside the handler and leaves evaluation running.
    # It is installed before these hooks; Lightning puts back what was there before when the Trainer is done.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is trained yet: a signal ends the run."""
        _take(_stop_now)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal ends `validate`; within training it is waited for the end of a batch."""
        self._validated = 0
        if not _training(trainer):
            _take(_stop_now)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal ends `test`."""
        _take(_stop_now)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal ends `predict`."""
        _take(_stop_now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal is noted and waits for the end of a step, for as long as training runs."""
        self._run = next(_runs)  # of this process; the same on all ranks
        _take(self._receive)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal ends what is left to do; nothing is half done when it does."""
        _take(_stop_now)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if _forked(signum):
            return
        if self._signal is not None:
            _die(signum)
        self._signal = signum

    # ---- when to stop -----------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Announce a stop, or save at the agreed step."""
        if not completes_step(trainer):
            return
        self._stay_near(trainer)
        stop = self._agreed_stop(trainer, "step", trainer.global_step)
        if stop is not None and trainer.global_step >= stop[0]:
            self._save(trainer)
            self._leaving_for = stop[1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave once the saved step has been logged, which comes after ``on_train_batch_end``.

        Raises:
            Stopped: The step was saved.
        """
        if self._leaving_for is not None:
            self._leave(trainer, self._leaving_for)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Announce a stop during training's validation, or leave it at the agreed batch.

        Raises:
            Stopped: See `on_validation_epoch_end`.
        """
        if _training(trainer):
            self._validated += 1
            self._stay_near(trainer)
            stop = self._agreed_stop(trainer, _validation(trainer), self._validated)
            if stop is not None and self._validated >= stop[0]:
                self.on_validation_epoch_end(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks meet once in every validation, so that all know of a stop; before results are put together.

        Raises:
            Stopped: A stop was announced, and a checkpoint that validates again saved.
        """
        if not _training(trainer):
            return
        self._agreed_stop(trainer, _validation(trainer), self._validated)
        trainer.strategy.barrier()
        stop = self._agreed_stop(trainer, _validation(trainer), self._validated)
        if stop is not None:
            with _before_validation(trainer):
                self._save(trainer)
            self._leave(trainer, stop[1])

    def _stay_near(self, trainer: Trainer) -> None:
        """Wait until the device has finished all but the last steps, so that `_LEAD` is enough."""
        if trainer.strategy.root_device.type != "cuda" or not (dist.is_available() and dist.is_initialized()):
            return
        event = torch.cuda.Event()
        event.record()
        self._launched.append(event)
        if len(self._launched) > _AHEAD:
            self._launched.popleft().synchronize()

    def _agreed_stop(self, trainer: Trainer, what: str, now: int) -> tuple[int, int] | None:
        """The step (or batch of a validation) to stop after, and the signal that asked for it."""
        if not (dist.is_available() and dist.is_initialized()):
            return (now, self._signal) if self._signal is not None else None
        store, key = dist.distributed_c10d._get_default_store(), f"pare/stop {self._run}/{what}"
        if self._signal is not None and what not in self._announced:
            # compare_set: when several ranks get the signal, the first one's step holds for all
            store.compare_set(key, "", f"{now + _LEAD[trainer.strategy.root_device.type]} {self._signal}")
            self._announced.add(what)
        if not store.check([key]):
            return None
        last, signum = store.get(key).decode().split()
        return int(last), int(signum)

    # ---- stopping ---------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer) -> None:
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath is not None:
            self._kept = Path(checkpoint.dirpath) / "last.ckpt"
            trainer.save_checkpoint(self._kept)

    def _leave(self, trainer: Trainer, signum: int) -> None:
        if trainer.is_global_zero:
            done = f"training was complete: validate with --ckpt_path {self._kept}"
            kept = done if trainer.fit_loop.done else f"continue with --ckpt_path {self._kept}"
            kept = kept if self._kept else "nothing kept: no ModelCheckpoint"
            print(f"stopped by {signal.Signals(signum).name} after step {trainer.global_step}; {kept}", file=sys.stderr)
        trainer.strategy.barrier()
        self._leaving_for = signum
        raise Stopped(signum)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Pass a stop on to the ranks that this one launched; name the likely cause when another rank is gone."""
        _take(_stop_now)
        launcher = trainer.strategy.launcher
        if isinstance(exception, Stopped) and self._leaving_for is None and launcher is not None:
            passed_on = signal.SIGRTMIN + exception.signum
            known = signal.getsignal(passed_on) is _launched_rank_stopped  # not in a program other than main.py
            launcher.kill(passed_on if known else exception.signum)
        if peer_lost(exception):
            print(
                f"rank {trainer.global_rank}: another rank has died (see its output above, or the kernel log for "
                "out-of-memory kills). Continue from the last complete checkpoint with --ckpt_path last.",
                file=sys.stderr,
                flush=True,
            )


def _training(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _validation(trainer: Trainer) -> str:
    return f"validation after step {trainer.global_step}"


@contextmanager
def _before_validation(trainer: Trainer) -> Iterator[None]:
    """Within the block, Lightning's counters say that the running validation has done nothing yet.

    A checkpoint of now would go on in its middle, without what its metrics have seen: a wrong perplexity.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    now = progress.state_dict()
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress.load_state_dict({**now, "total": begun, "current": begun, "is_last_batch": False})
    try:
        yield
    finally:
        progress.load_state_dict(now)


def _take(handler: Any) -> dict[int, Any]:
    """Install a handler in this process; returns those that were there."""
    global _listener
    _listener = os.getpid()
    return {signum: signal.signal(signum, handler) for signum in SIGNALS}


def _stop_now(signum: int, frame: FrameType | None) -> None:
    if _forked(signum):
        return
    _take(_second_signal)
    if _started_by_a_rank():
        os.kill(os.getppid(), signal.SIGRTMIN + signum)
    else:
        os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())  # safe in a handler, unlike print
    raise Stopped(signum)


@contextmanager
def _heard() -> Iterator[None]:
    """Within the block, end the process when the handler of a signal that should stop it at once is not run."""
    global _watching
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # the system's handler writes there at once
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    _watching += 1
    try:
        yield
    finally:
        _watching -= 1
        signal.set_wakeup_fd(before)
        os.write(writer, _END)  # not closed: forked children may have it open
        watcher.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int) -> None:
    while (got := os.read(reader, 1)) != _END:
        signum = _PASSED_ON.get(got[0], got[0])
        if signum not in SIGNALS:
            continue
        until = time.monotonic() + _DEAF_S
        while (left := until - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0] and os.read(reader, 1) == _END:
                return
        # in training the signal waits for the end of a step, however long; once it is heard, the handler is another
        if signal.getsignal(signum) is _stop_now:
            name = signal.Signals(signum).name
            os.write(2, f"stopped by {name}, which could not be heard for {_DEAF_S:.0f} s\n".encode())
            os._exit(0 if _started_by_a_rank() else 128 + signum)


def _forget_watcher() -> None:
    """In a forked child, whose signals are no business of its parent's."""
    if _watching:
        signal.set_wakeup_fd(-1)


_watching = 0
os.register_at_fork(after_in_child=_forget_watcher)


def _launched_rank_stopped(signum: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGTERM) is not _second_signal:  # else it is known already
        _stop_now(_PASSED_ON[signum], frame)


def _second_signal(signum: int, frame: FrameType | None) -> None:
    _die(signum)


def _die(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


_listener = 0


def _forked(signum: int) -> bool:
    """Deal with a signal in a process forked from this one: a loader's worker inherits the handlers.

    Ctrl-C reaches workers too, but when to end them is for the process that uses them to say.
    """
    if os.getpid() == _listener:
        return False
    if signum != signal.SIGINT:
        _die(signum)
    return True


def _started_by_a_rank() -> bool:
    """Whether Lightning's launcher started this process from another rank's."""
    return "LOCAL_RANK" in os.environ and os.environ.get(_PARENT) == str(os.getppid())
