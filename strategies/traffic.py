"""Counters of what the gradient path really sends, and how long it takes.

Bytes are counted where a collective is called, never derived from a ratio: a compressor that sends fp32 after
"compressing" is seen to send fp32. Only bytes that leave this rank count; a rank's own chunk never travels.

Times are host times on CPU, where gloo blocks, and CUDA event times on a GPU, read without synchronising the host.
"wire" includes waiting for the slowest rank.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["encode", "wire", "decode"]


@dataclass
class StepTraffic:
    """What one rank sent and spent since the last reading.

    Attributes:
        sent: Bytes that left this rank, by ``(unit, collective, role)``; the role "parameters", with or without a kind
            behind a point ("parameters.scales"), is not gradient traffic.
        calls: Collectives issued, by ``(unit, collective)``.
        ideal: Bytes of an ideal (ring) fp32 reduction of the gradients, by unit.
        levels: Bytes by level, where reductions have two ("intra" a group of ranks, "inter" groups); gradients and
            parameters together.
        plain: Bytes that gathers of parameters would have sent in fp32.
        native: Bytes that torch's own reduction sends on this backend, by unit.
        ms: Milliseconds by ``(unit, phase, collective)``; the collective is "" for encode and decode.
        extra_calls: Collectives of the gradient path after the first of each reduction.
        extra_ms: Milliseconds in those; part of ``ms``.
    """

    sent: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    calls: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    levels: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    ideal: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    native: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ms: dict[tuple[str, str, str], float] = field(default_factory=lambda: defaultdict(float))
    plain: float = 0.0
    extra_calls: int = 0
    extra_ms: float = 0.0

    def bytes_by(self, part: Literal["unit", "collective", "role"], *, gradients: bool = True) -> dict[str, int]:
        """Bytes sent, summed by one part of the key; ``gradients=False`` gives the parameter traffic instead."""
        place = ("unit", "collective", "role").index(part)
        totals: dict[str, int] = defaultdict(int)
        for key, nbytes in self.sent.items():
            if (key[2].partition(".")[0] != "parameters") == gradients:
                totals[key[place]] += nbytes
        return dict(totals)

    def gradient_bytes(self) -> int:
        """Bytes sent to reduce gradients."""
        return sum(self.bytes_by("unit").values())

    def parameter_bytes(self) -> int:
        """Bytes sent to gather parameters."""
        return sum(self.bytes_by("unit", gradients=False).values())

    def add(self, key: tuple[str, str, str], extra: bool, ms: float) -> None:
        """Count ``ms`` under ``(unit, phase, collective)``, and as extra too if it is."""
        self.ms[key] += ms
        self.extra_ms += ms if extra else 0.0

    def phase_ms(self, phase: Phase) -> float:
        """Milliseconds in one phase, all units together."""
        return sum(ms for (_, name, _), ms in self.ms.items() if name == phase)

    def collective_ms(self) -> dict[str, float]:
        """Milliseconds on the wire by collective."""
        totals: dict[str, float] = defaultdict(float)
        for (_, phase, collective), ms in self.ms.items():
            if phase == "wire":
                totals[collective] += ms
        return dict(totals)


@dataclass
class Fidelity:
    """How far decode(encode(g)) of this rank is from g, summed over units as device tensors (no host sync).

    Attributes:
        sums: ``[5]``: squared error, squared norm of g, squared norm of ĝ, their dot product, non-zeros of ĝ.
        numel: Elements compared.
    """

    sums: Tensor
    numel: int = 0

    def add(self, sent: Tensor, decoded: Tensor) -> None:
        """Accumulate one unit: ``sent`` is the gradient, ``decoded`` what a receiver reconstructs, both ``[n, s]``."""
        exact, approximate = sent.float().flatten(), decoded.float().flatten()
        error = approximate - exact
        parts = [error @ error, exact @ exact, approximate @ approximate, exact @ approximate]
        self.sums += torch.stack([*parts, approximate.count_nonzero().float()])
        self.numel += exact.numel()

    def read(self) -> dict[str, float]:
        """Relative L2 error, cosine similarity and density (share of non-zeros). Synchronises the host."""
        error, exact, approximate, dot, nonzero = self.sums.double().tolist()
        norms = (exact * approximate) ** 0.5
        return {
            "grad_rel_error": (error / exact) ** 0.5 if exact > 0 else 0.0,
            "grad_cos_sim": dot / norms if norms > 0 else 1.0,
            "density": nonzero / max(self.numel, 1),
        }


class Traffic:
    """One rank's counters, shared by all FSDP units.

    Set ``sampling`` before a backward pass to have codecs report their error into ``fidelity``.
    Set ``counting`` to False where what is sent belongs to no training step, as in validation or while saving.
    """

    def __init__(self) -> None:
        self.counting = True
        self.step = StepTraffic()
        self.sampling = False
        self.fidelity: Fidelity | None = None
        self._pending: list[tuple[tuple[str, str, str], bool, torch.cuda.Event, torch.cuda.Event]] = []
        self._exchanged = False  # whether the reduction under way has had its first collective

    def sent(self, unit: str, collective: str, role: str, nbytes: int, level: str = "") -> None:
        """Count ``nbytes`` that leave this rank; ``level`` as in ``Unit``."""
        if self.counting:
            self.step.sent[unit, collective, role] += nbytes
            if level:
                self.step.levels[level] += nbytes

    def called(self, unit: str, collective: str) -> None:
        """Count one call of a collective."""
        if self.counting:
            self.step.calls[unit, collective] += 1

    def baseline(self, unit: str, ideal: float, native: float) -> None:
        """A reduction begins: count what it would have sent uncompressed, in bytes."""
        self._exchanged = False
        if self.counting:
            self.step.ideal[unit] += ideal
            self.step.native[unit] += native

    def gathers(self, numel: int, world_size: int) -> None:
        """Parameters of ``numel`` elements are gathered: count what that would have sent uncompressed."""
        if self.counting:
            self.step.plain += 4 * numel * (world_size - 1) / world_size

    @contextmanager
    def timed(
        self, unit: str, phase: Phase, device: torch.device, collective: str = "", parameters: bool = False
    ) -> Iterator[None]:
        """Time a phase on ``device``; the name appears in profiler traces. ``parameters``: no part of a reduction."""
        key = (unit, phase, collective)
        exchange = phase == "wire" and not parameters
        extra = exchange and self._exchanged
        self._exchanged |= exchange
        self.step.extra_calls += extra and self.counting
        label = f"pare::{phase}" + (f"::{collective}" if collective else "")
        with torch.profiler.record_function(label):
            if not self.counting:
                yield
            elif device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._pending.append((key, extra, begin, end))
            else:
                start = time.perf_counter()
                yield
                self.step.add(key, extra, (time.perf_counter() - start) * 1e3)

    def take(self) -> StepTraffic:
        """Return the counters since the last call and start afresh.

        On CUDA, work that the device has not finished is reported by a later call: totals are exact, and the host never
        waits.
        """
        waiting = []
        for key, extra, begin, end in self._pending:
            if end.query():
                self.step.add(key, extra, begin.elapsed_time(end))
            else:
                waiting.append((key, extra, begin, end))
        self._pending = waiting
        step, self.step = self.step, StepTraffic()
        return step

    def absorb(self, other: StepTraffic) -> None:
        """Add what another thread has counted."""
        own = self.step
        for name in ("sent", "calls", "levels", "ideal", "native", "ms"):
            totals = getattr(own, name)
            for key, value in getattr(other, name).items():
                totals[key] += value
        own.plain += other.plain
        own.extra_calls += other.extra_calls
        own.extra_ms += other.extra_ms

    def start_sampling(self, device: torch.device) -> None:
        """Compare every unit's gradient with its decoded self until ``take_fidelity``."""
        self.sampling, self.fidelity = True, Fidelity(torch.zeros(5, device=device, dtype=torch.float32))

    def take_fidelity(self) -> dict[str, float]:
        """Return the error of the sampled step and stop sampling; empty when no codec ran, and then it goes on."""
        if self.fidelity is not None and not self.fidelity.numel:
            return {}
        fidelity, self.fidelity, self.sampling = self.fidelity, None, False
        return fidelity.read() if fidelity is not None else {}
