"""What a check is told, and what it says."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from common.measure.timing import interleaved


@dataclass(frozen=True)
class Setting:
    """Where a check runs.

    Attributes:
        device: The first GPU, or the CPU.
        tiny: Smallest sizes, that run in seconds on a CPU: the same code, and figures that say nothing.
    """

    device: torch.device
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in: bfloat16 on GPUs."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def size(self, full: int, tiny: int) -> int:
        """A size, or the one for trying the check itself."""
        return tiny if self.tiny else full

    def milliseconds(self, call: Callable[[], object], repeats: int = 20) -> float:
        """Median time of a call, after three that warm up."""
        return median(interleaved({"it": call}, 2 if self.tiny else repeats, 1 if self.tiny else 3)["it"])


def found(
    name: str,
    what: str,
    value: float | None,
    unit: str = "",
    target: str = "report",
    reached: bool | None = None,
    spread: float | None = None,
    **details: Any,
) -> dict[str, Any]:
    """A figure of a check; see ``bench.tables.figures.append``, which stamps it with code and machine."""
    return {
        "figure": name,
        "what": what,
        "value": value,
        "unit": unit,
        "target": target,
        "reached": reached,
        "spread": spread,
        "details": details,
    }


def at_most(name: str, what: str, value: float, most: float, unit: str = "", **details: Any) -> dict[str, Any]:
    """A figure that must not exceed a limit; NaN does."""
    return found(name, what, value, unit, f"≤ {most:g} {unit}".strip(), bool(value <= most), **details)


def at_least(name: str, what: str, value: float, least: float, unit: str = "", **details: Any) -> dict[str, Any]:
    """A figure that must reach a limit; NaN does not."""
    return found(name, what, value, unit, f"≥ {least:g} {unit}".strip(), bool(value >= least), **details)
