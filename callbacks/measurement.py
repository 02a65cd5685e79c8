"""What callbacks that measure have in common."""

import time
from abc import abstractmethod
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


def completes_step(trainer: Trainer) -> bool:
    """Whether the micro-batch that just ended was the last of its optimizer step; call in ``on_train_batch_end``."""
    return not trainer.fit_loop._should_accumulate()


class StepClock:
    """Durations of optimizer steps in ms: all micro-batches of a step, from start to end of each.

    Loading data, validation and saving lie between micro-batches and do not count. On CUDA the clock records events and
    reads them later, so that the host does not wait for the device. Its state goes through checkpoints: a resumed run
    knows the steps before.
    """

    def __init__(self) -> None:
        self._before: list[float] = []
        self._resumed: list[int] = []  # steps done when the run was resumed
        self._begin: Any = None
        self._parts: list[Any] = []
        self._steps: list[Any] = []

    def start(self) -> None:
        """A micro-batch begins."""
        self._begin = self._now()

    def stop(self, step_done: bool) -> None:
        """A micro-batch ends, and with it perhaps the step."""
        self._parts.append((self._begin, self._now()))
        if step_done:
            self._steps.append(self._parts)
            self._parts = []

    def last_ms(self) -> float | None:
        """Duration of the last step; None while its device work is unfinished."""
        return self._duration(self._steps[-1], wait=False) if self._steps else None

    def all_ms(self) -> list[float]:
        """Durations of all steps; waits for the device."""
        return self._before + [ms for step in self._steps if (ms := self._duration(step, wait=True)) is not None]

    def warm_ms(self, warmup_steps: int) -> list[float]:
        """Durations without the first steps, and without the first ones after each resumption."""
        cold = {start + i for start in (0, *self._resumed) for i in range(warmup_steps)}
        return [ms for i, ms in enumerate(self.all_ms()) if i not in cold]

    def state_dict(self) -> dict[str, Any]:
        """Durations so far, and where the run was resumed."""
        return {"ms": torch.tensor(self.all_ms(), dtype=torch.float64), "resumed": self._resumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self._before = state_dict["ms"].tolist()
        self._resumed = [*state_dict["resumed"], len(self._before)]
        self._steps, self._parts = [], []

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
