"""What callbacks that measure have in common."""

import time
from abc import abstractmethod
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


class Measurement(Callback):
    """A callback whose result belongs in the run record.

    Attributes:
        during_validate: It measures in ``validate`` too, which then writes a record.
    """

    during_validate: bool = False

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Fields of the run record (``common.records.schema``), on rank 0 at the end; none if nothing was measured."""


def computed_in(precision: Any) -> torch.dtype:
    """What a Trainer of this precision computes in: "bf16-true", "16-mixed", "32-true", …"""
    halves = {"bf16": torch.bfloat16, "16": torch.float16}
    return halves.get(str(precision).partition("-")[0], torch.float32)


def completes_step(trainer: Trainer) -> bool:
    """Whether the micro-batch that just ended was the last of its optimizer step; call in ``on_train_batch_end``."""
    return not trainer.fit_loop._should_accumulate()


def validate_now(trainer: Trainer) -> None:
    """Run the validation of `fit` where Lightning does not: before the first step, or after the last.

    A restored loop would take the validation before for its own, and leave out as many batches as that had read.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.restarting = False
    loop.run()
    trainer.training = True


class StepClock:
    """Durations of optimizer steps in ms: all micro-batches of a step, from start to end of each.

    Loading data, validation and saving lie between micro-batches and do not count. On CUDA the clock records events and
    reads them, once, when the device has passed them, so that the host does not wait for it. Its state goes through
    checkpoints: a resumed run knows the steps before.
    """

    def __init__(self) -> None:
        self._ms: list[float] = []  # of the steps that the device has finished
        self._resumed: list[int] = []  # steps done when the run was resumed
        self._begin: Any = None
        self._parts: list[Any] = []
        self._unfinished: deque[list[Any]] = deque()

    def start(self) -> None:
        """A micro-batch begins."""
        self._begin = self._now()

    def stop(self, step_done: bool) -> None:
        """A micro-batch ends, and with it perhaps the step."""
        self._parts.append((self._begin, self._now()))
        if step_done:
            self._unfinished.append(self._parts)
            self._parts = []
            self._read(wait=False)

    def last_ms(self) -> float | None:
        """Duration of the newest step that the device has finished; None where this process has none yet."""
        before = self._resumed[-1] if self._resumed else 0
        return self._ms[-1] if len(self._ms) > before else None

    @property
    def finished(self) -> int:
        """How many steps the device has finished, of all processes of the run."""
        return len(self._ms)

    def all_ms(self) -> list[float]:
        """Durations of all steps; waits for the device."""
        self._read(wait=True)
        return list(self._ms)

    def warm(self, warmup_steps: int) -> list[int]:
        """Which steps count: all but the first ones, and the first ones after each resumption."""
        cold = {start + i for start in (0, *self._resumed) for i in range(warmup_steps)}
        return [step for step in range(len(self.all_ms())) if step not in cold]

    def state_dict(self) -> dict[str, Any]:
        """Durations so far, and where the run was resumed."""
        return {"ms": torch.tensor(self.all_ms(), dtype=torch.float64), "resumed": self._resumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self._ms = state_dict["ms"].tolist()
        self._resumed = [*state_dict["resumed"], len(self._ms)]
        self._parts = []
        self._unfinished.clear()

    def _read(self, wait: bool) -> None:
        """Take over the durations of finished steps; their events are not needed any more."""
        while self._unfinished and (ms := self._duration(self._unfinished[0], wait)) is not None:
            self._ms.append(ms)
            self._unfinished.popleft()

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _duration(parts: list[Any], wait: bool) -> float | None:
        if isinstance(parts[0][0], float):
            return sum(end - begin for begin, end in parts) * 1e3
        if wait:
            parts[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in parts) if parts[-1][1].query() else None
