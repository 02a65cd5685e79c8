"""Step time, tokens per second and model FLOPs utilisation."""

import resource
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.measurement import Measurement, StepClock, completes_step
from common.measure.peaks import peak_flops
from common.measure.timing import percentiles
from lightning_modules.causal_lm import CausalLM


class Throughput(Measurement):
    """Logs ``perf/step_ms``, ``perf/tokens_per_s`` and, where the device's peak is known, ``perf/mfu``.

    Padding is no token. What is logged takes the other ranks for as full as this one; the record has counted them all.
    MFU counts the model's own forward and backward FLOPs (PaLM, arXiv 2204.02311), not recomputation.

    Args:
        warmup_steps: First optimizer steps left out of the record: compilation, cold caches, memory growth. Step times
            also leave out as many after each resumption.
    """

    def __init__(self, warmup_steps: int = 5) -> None:
        self.warmup_steps = warmup_steps
        self.clock = StepClock()
        self._tokens: list[int | Tensor] = []  # by step: all ranks' up to `_counted`, then this rank's
        self._counted = 0
        self._of_step: int | Tensor = 0
        self._trainer: Trainer | None = None
        self._flops_per_token: float | None = None
        self._peak_flops: float | None = None
        self._peaks: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the model's FLOPs once, on the meta device."""
        self._trainer = trainer
        if trainer.is_global_zero and (peak := self._peak(trainer)) and isinstance(pl_module, CausalLM):
            self._peak_flops = peak * trainer.world_size
            self._flops_per_token = _training_flops_per_token(pl_module.meta_model(), trainer.datamodule.block_size)

    def _peak(self, trainer: Trainer) -> float | None:
        dtype = torch.bfloat16 if "16" in str(trainer.precision) else torch.float32
        return peak_flops(trainer.strategy.root_device, dtype)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._of_step = self._of_step + _tokens(batch)
        self.clock.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock; log when a step is complete."""
        done = completes_step(trainer)
        self.clock.stop(done)
        if not done:
            return
        self._tokens.append(self._of_step)
        self._of_step = 0
        if (step_ms := self.clock.last_ms()) is None:
            return
        metrics: dict[str, Any] = {"perf/step_ms": step_ms}
        tokens = self._tokens[self.clock.finished - 1]
        if isinstance(tokens, Tensor) or tokens:
            everywhere = tokens if self.clock.finished <= self._counted else tokens * trainer.world_size
            metrics["perf/tokens_per_s"] = everywhere / step_ms * 1e3
            if self._flops_per_token and self._peak_flops:
                metrics["perf/mfu"] = metrics["perf/tokens_per_s"] * self._flops_per_token / self._peak_flops
        pl_module.log_dict(metrics, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the tokens of all ranks: only rank 0 is asked for a summary."""
        self._count()

    def _count(self) -> None:
        """Add up all ranks' tokens of the steps since this was last done: one collective, instead of one a step."""
        own, trainer = self._tokens[self._counted :], self._trainer
        if not own or trainer is None:
            return
        device = trainer.strategy.root_device
        counts: Any = torch.stack([torch.as_tensor(tokens, device=device) for tokens in own])
        self._tokens[self._counted :] = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self._counted = len(self._tokens)

    def _memory(self) -> dict[str, float]:
        """Peaks of memory, of all processes that the run has had."""
        now = {"host_peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
        if torch.cuda.is_available():
            now["mem_peak_alloc_gb"] = torch.cuda.max_memory_allocated() / 1e9
            now["mem_peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return now | {name: max(peak, now.get(name, 0.0)) for name, peak in self._peaks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Times, tokens and memory so far, so that a resumed run reports all of its steps; called on all ranks."""
        self._count()
        tokens = torch.tensor(self._tokens, dtype=torch.int64)
        return {"clock": self.clock.state_dict(), "tokens": tokens, "memory": self._memory()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.clock.load_state_dict(state_dict["clock"])
        self._tokens, self._peaks = state_dict["tokens"].tolist(), state_dict["memory"]
        self._counted = len(self._tokens)

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        steps, durations = self.clock.warm(self.warmup_steps), self.clock.all_ms()
        if not steps:
            return {}
        measured = [durations[step] for step in steps]
        stats, tokens = percentiles(measured), sum(int(self._tokens[step]) for step in steps)
        fields: dict[str, Any] = {
            "steps_measured": len(durations) - self.warmup_steps,
            "step_time_ms_mean": stats["mean"],
            "step_time_ms_p50": stats["p50"],
            "step_time_ms_p90": stats["p90"],
            "step_time_ms_p95": stats["p95"],
            "tokens_per_s": tokens / sum(measured) * 1e3 if tokens else None,
            **self._memory(),
        }
        if self._flops_per_token and self._peak_flops and tokens:
            fields["mfu"] = fields["tokens_per_s"] * self._flops_per_token / self._peak_flops
        return fields


def _tokens(batch: Any) -> int | Tensor:
    """Tokens of a batch without its padding, on the device where they are counted; 0 for what is no batch of tokens."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return 0
    mask = batch.get("attention_mask")
    tokens: int | Tensor = batch["input_ids"].numel() if mask is None else mask.sum(dtype=torch.int64)
    return tokens


def _training_flops_per_token(meta_model: torch.nn.Module, length: int) -> float:
    """Forward and backward FLOPs of one sequence of ``length`` tokens, divided by its tokens."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")

    def forward() -> torch.Tensor:
        return meta_model(input_ids=ids, use_cache=False).logits

    return measure_flops(meta_model, forward, torch.Tensor.sum) / length
