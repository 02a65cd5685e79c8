"""What compressed gradients cost on the wire, per unit and step."""

import csv
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.measurement import Measurement, StepClock, completes_step
from strategies import residuals
from strategies.traffic import StepTraffic, Traffic
from strategies.units import Unit

_COLUMNS = ("step", "unit", "sent_bytes", "ideal_bytes", "parameter_bytes", "encode_ms", "wire_ms", "decode_ms")
_COUNTERS = ("totals", "collective_ms", "role_bytes", "parameter_bytes", "level_bytes", "samples")


class TrafficMonitor(Measurement):
    """Logs the bytes and times that the strategy's transport counted, on rank 0.

    Tags: ``comm/sent_mb`` and ``comm/parameters_mb`` (bytes that left the rank in a step), ``comm/ratio`` (ideal fp32
    ring bytes over bytes sent for gradients), ``comm/encode_ms``, ``comm/wire_ms``, ``comm/decode_ms`` and
    ``comm/share`` (wire time, waiting for other ranks included, over step time); with replicas ``comm/intra_mb`` and
    ``comm/inter_mb``, inside and between them. ``traffic.csv`` in the log folder has a row per unit and step.

    Args:
        warmup_steps: First optimizer steps left out of the record.
        sample_every: Every so many steps compare each unit's gradient with its decoded self: relative error, cosine and
            density (``comm/grad_*``), and log the norm of this rank's residual (``comm/residual_norm``). 0 never does.
        nic: Also read this network interface's own counter of sent bytes ("eth0"; "lo" when ranks share a machine,
            where it counts all ranks), to hold against the counted bytes.

    Raises:
        ValueError: There is no interface ``nic``.
    """

    def __init__(self, warmup_steps: int = 5, sample_every: int = 50, nic: str | None = None) -> None:
        self.warmup_steps = warmup_steps
        self.sample_every = sample_every
        self.nic_counters = Path(f"/sys/class/net/{nic}/statistics") if nic else None
        if self.nic_counters is not None and not self.nic_counters.is_dir():
            raise ValueError(f"TrafficMonitor.nic: no network interface {nic!r} on this machine")
        self.clock = StepClock()
        self.steps = 0
        self._traffic: Traffic | None = None
        self._totals: dict[str, float] = defaultdict(float)
        self._collective_ms: dict[str, float] = defaultdict(float)
        self._role_bytes: dict[str, int] = defaultdict(int)
        self._parameter_bytes: dict[str, int] = defaultdict(int)
        self._level_bytes: dict[str, int] = defaultdict(int)
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._units: list[Unit] = []
        self._keeping: list[Unit] = []
        self._nic_start = self._nic_end = (0, 0)
        self._nic_before = (0, 0)
        self._rows: Any = None
        self._file: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the strategy's counters."""
        compressors = (getattr(trainer.strategy, name, None) for name in ("compressor", "parameter_compressor"))
        counting = any(compressor is not None for compressor in compressors)
        self._traffic = trainer.strategy.traffic if counting else None
        if counting:
            self._meet_units(trainer)  # a run resumed behind its last step sees no batch
        folder = trainer.log_dir  # a collective: every rank must ask
        if self._traffic is not None and trainer.is_global_zero and folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(folder) / "traffic.csv", "a", newline="")  # noqa: SIM115
            self._rows = csv.writer(self._file)
            if self._file.tell() == 0:
                self._rows.writerow(_COLUMNS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what setting up sent, and from now on count within training steps alone."""
        self._nic_start = self._nic_end = self._read_nic()
        if self._traffic is not None:
            self._traffic.take()
            self._traffic.counting = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock and counting, and sampling when it is due."""
        if self._traffic is None:
            return
        self._traffic.counting = True
        self.clock.start()
        due = self.sample_every and trainer.global_step % self.sample_every == 0
        if due and not self._traffic.sampling:
            self._traffic.start_sampling(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Read the counters when a step is complete."""
        if self._traffic is None:
            return
        self._traffic.counting = False  # until the next batch: validation and checkpoints gather parameters, too
        done = completes_step(trainer)
        self.clock.stop(done)
        if not done:
            return
        began = time.perf_counter()
        step = self._traffic.take()
        sampled = self._traffic.sampling
        fidelity = self._traffic.take_fidelity()
        self.steps += 1
        if self.steps == self.warmup_steps:
            self._nic_start = self._nic_end = self._read_nic()
        if self.steps > self.warmup_steps:
            self._add(step)
            self._nic_end = self._read_nic()
        for name, value in fidelity.items():
            self._samples[name].append(value)
        self._meet_units(trainer)
        if sampled and (residual := residuals.norm(self._units)) is not None:
            fidelity["residual_norm"] = residual.item()
        if trainer.is_global_zero:
            self._log(trainer, pl_module, step, fidelity)
        self._totals["monitor_ms"] += (time.perf_counter() - began) * 1e3

    def _meet_units(self, trainer: Trainer) -> None:
        self._units = trainer.strategy.units
        self._keeping = [*self._units, *trainer.strategy.keepers]

    def _read_nic(self) -> tuple[int, int]:
        """Bytes and packets that the interface has sent since it came up."""
        if self.nic_counters is None:
            return 0, 0
        return int((self.nic_counters / "tx_bytes").read_text()), int((self.nic_counters / "tx_packets").read_text())

    def _add(self, step: StepTraffic) -> None:
        self._totals["gradients"] += step.gradient_bytes()
        self._totals["parameters"] += step.parameter_bytes()
        self._totals["ideal"] += sum(step.ideal.values())
        self._totals["plain"] += step.plain
        self._totals["native"] += sum(step.native.values())
        self._totals["encode"] += step.phase_ms("encode")
        self._totals["decode"] += step.phase_ms("decode")
        self._totals["extra_calls"] += step.extra_calls
        self._totals["extra_ms"] += step.extra_ms
        for collective, ms in step.collective_ms().items():
            self._collective_ms[collective] += ms
        for role, nbytes in step.bytes_by("role").items():
            self._role_bytes[role] += nbytes
        for role, nbytes in step.bytes_by("role", gradients=False).items():
            self._parameter_bytes[role] += nbytes
        for level, nbytes in step.levels.items():
            self._level_bytes[level] += nbytes

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: StepTraffic, fidelity: dict[str, float]) -> None:
        sent = step.gradient_bytes()
        metrics = {
            "comm/sent_mb": sent / 1e6,
            "comm/parameters_mb": step.parameter_bytes() / 1e6,
            "comm/encode_ms": step.phase_ms("encode"),
            "comm/wire_ms": step.phase_ms("wire"),
            "comm/decode_ms": step.phase_ms("decode"),
            **{f"comm/{name}": value for name, value in fidelity.items()},
        }
        if sent:
            metrics["comm/ratio"] = sum(step.ideal.values()) / sent
        if step_ms := self.clock.last_ms():
            metrics["comm/share"] = metrics["comm/wire_ms"] / step_ms
        metrics |= {f"comm/{level}_mb": nbytes / 1e6 for level, nbytes in step.levels.items()}
        pl_module.log_dict(metrics, rank_zero_only=True)
        if self._rows is not None:
            self._rows.writerows(_rows(trainer.global_step, step))

    def state_dict(self) -> dict[str, Any]:
        """Counters so far, so that a resumed run reports all of its bytes. They are rank 0's, as the record's are."""
        return {
            "steps": self.steps,
            "clock": self.clock.state_dict(),
            "nic": list(self._nic_total()),
            **{name: dict(getattr(self, f"_{name}")) for name in _COUNTERS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.steps = state_dict["steps"]
        self.clock.load_state_dict(state_dict["clock"])
        self._nic_before = tuple(state_dict["nic"])
        for name in _COUNTERS:
            getattr(self, f"_{name}").update(state_dict.get(name, {}))

    def _nic_total(self) -> tuple[int, int]:
        """Bytes and packets that the interface sent in the measured steps."""
        (sent, packets), (first, first_packet) = self._nic_end, self._nic_start
        return self._nic_before[0] + sent - first, self._nic_before[1] + packets - first_packet

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the table, also after an error."""
        if self._traffic is not None:
            self._traffic.counting = True
        if self._file is not None:
            self._file.close()
            self._file = self._rows = None

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``; totals are rank 0's, over the steps after warm-up."""
        measured = self.clock.all_ms()[self.warmup_steps :]
        if self._traffic is None or not measured:
            return {}
        wire_ms, sent = sum(self._collective_ms.values()), self._totals["gradients"]
        fields: dict[str, Any] = {
            "steps_measured": len(measured),
            "comm_time_ms_total": wire_ms,
            "comm_ratio": wire_ms / sum(measured),
            "comm_time_ms_by_op": dict(self._collective_ms),
            "bytes_raw_total": round(self._totals["ideal"]),
            "bytes_native_total": round(self._totals["native"]),
            "bytes_compressed_total": round(sent),
            "bytes_by_role": dict(self._role_bytes),
            "bytes_parameters_total": round(self._totals["parameters"]),
            "bytes_parameters_by_role": dict(self._parameter_bytes),
            "bytes_by_level": dict(self._level_bytes) or None,
            "compression_ratio": self._totals["ideal"] / sent if sent else None,
            "compress_time_ms": self._totals["encode"],
            "decompress_time_ms": self._totals["decode"],
            "extra_collectives": round(self._totals["extra_calls"]),
            "extra_collective_time_ms": self._totals["extra_ms"],
            "index_bytes": self._role_bytes.get("indices", 0),
            "effective_bandwidth": (sent + self._totals["parameters"]) / (wire_ms / 1e3) if wire_ms else None,
            "effective_bandwidth_raw": (self._totals["ideal"] + self._totals["plain"]) / (wire_ms / 1e3)
            if wire_ms
            else None,
            "compressor_state_bytes": sum(residuals.nbytes(unit) for unit in self._keeping),
            "monitor_ms_per_step": self._totals["monitor_ms"] / self.steps,
            **{name: sum(values) / len(values) for name, values in self._samples.items()},
        }
        if (residual := residuals.norm(self._units)) is not None:
            fields["residual_norm"] = residual.item()
        if self.nic_counters is not None:
            fields["bytes_nic_total"], fields["packets_nic_total"] = self._nic_total()
        return fields


def _rows(step_number: int, step: StepTraffic) -> list[tuple[Any, ...]]:
    """One row per unit, in ``_COLUMNS`` order."""
    ms: dict[tuple[str, str], float] = defaultdict(float)
    for (unit, phase, _), value in step.ms.items():
        ms[unit, phase] += value
    gradients, parameters = step.bytes_by("unit"), step.bytes_by("unit", gradients=False)
    return [
        (
            step_number,
            unit,
            gradients.get(unit, 0),
            round(step.ideal.get(unit, 0)),
            parameters.get(unit, 0),
            *(round(ms[unit, phase], 3) for phase in ("encode", "wire", "decode")),
        )
        for unit in sorted(gradients | parameters)
    ]
