"""How long a prompt fits into memory, with and without token pruning; the machine survives the search."""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForCausalLM, PretrainedConfig

from callbacks.measurement import Measurement
from callbacks.prefill_timing import chosen, given, placed, pruned_read, read
from common.measure.memory import limit_process, longest_that_fits, resident_now, resident_peak
from lightning_modules.token_pruning.anatomy import anatomy, input_device
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.scorers.learned import Learned

_CAUTION = 0.8  # share of the free memory that the search may use when no limit is given


class PrefillMemory(Measurement):
    """Finds the longest prompt that fits in `validate`, by doubling and then bisecting, without and with pruning.

    On a GPU an allocation that fails is caught. On a CPU a child process with a memory limit of its own reads random
    tokens with a model of the same shape (random weights), so that too long a prompt ends an allocation, or at worst
    the child, never this process or the machine.

    Args:
        scorer: Which tokens to keep; by default the module's trained pruner.
        schedule: After which layers and how many; by default the module's.
        pruner: What `calibrate` found, in place of both: its folder.
        start: First length to try, in tokens.
        longest: Longest length to try.
        resolution: Bisecting ends at this many tokens.
        limit_gb: CPU only: memory for weights, cache and activations (1e9 bytes); by default 80 % of what is free.
    """

    during_validate = True

    def __init__(
        self,
        scorer: Scorer | None = None,
        schedule: Schedule | None = None,
        pruner: str | None = None,
        start: int = 1024,
        longest: int = 131072,
        resolution: int = 512,
        limit_gb: float | None = None,
    ) -> None:
        if not 2 <= start <= longest or resolution < 1:
            raise ValueError(f"2 ≤ start ≤ longest and resolution ≥ 1, got {start}, {longest} and {resolution}")
        if limit_gb is not None and limit_gb <= 0:
            raise ValueError(f"limit_gb must be positive, got {limit_gb}")
        self.scorer, self.schedule, self.base = given(scorer, schedule, pruner)
        self.start, self.longest, self.resolution, self.limit_gb = start, longest, resolution, limit_gb
        self._measured: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search for both arms, and print what every length needed.

        Raises:
            ValueError: More than one process, a limit above the free memory, a model that is offloaded on a CPU, or no
                scorer and schedule to use.
        """
        if trainer.state.fn != "validate":
            return
        if trainer.world_size > 1:
            raise ValueError(f"PrefillMemory measures one process, not {trainer.world_size}: set trainer.devices to 1")
        scorer, schedule = chosen(self.scorer, self.schedule, pl_module)
        model: Any = pl_module.model
        PromptPruner(scorer, schedule, base=self.base).check(model.config)
        place = placed(model)
        devices = [torch.device(name) for name in place["devices"]]
        on_gpu = devices[0].type == "cuda"
        if place["offloaded"] and not on_gpu:
            raise ValueError("PrefillMemory on a CPU tries a copy that cannot be offloaded: leave device_map out")
        limit = self._limit(devices)
        block: dict[str, Any] = {"limit_bytes": limit, "placement": place, "arms": []}
        for name, pruner in (("baseline", None), ("pruned", PromptPruner(scorer, schedule, base=self.base))):
            probe = _Gpu(model, pruner, devices) if on_gpu else _Cpu(model, pruner, limit)
            block["arms"].append({"arm": name, **self._search(name, probe, anatomy(model).longest)})
            probe.close()
        base, pruned = (arm["longest"] for arm in block["arms"])
        print(f"Longest prompt within {limit / 1e9:.2f} GB: baseline={base} pruned={pruned} tokens", flush=True)
        self._measured = {"prefill_memory": block}

    def _limit(self, devices: list[torch.device]) -> int:
        if devices[0].type == "cuda":
            return sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
        free = psutil.virtual_memory().available
        limit = int(free * _CAUTION if self.limit_gb is None else self.limit_gb * 1e9)
        if limit > free:
            raise ValueError(f"limit_gb {limit / 1e9:.1f} is more than the {free / 1e9:.1f} GB that are free")
        return limit

    def _search(self, name: str, probe: Any, positions: int | None) -> dict[str, Any]:
        probes: list[dict[str, Any]] = []

        def fits(length: int) -> bool:
            peak = probe.peak(length)
            probes.append({"length": length, "fits": peak is not None, "peak_bytes": peak})
            found = "does not fit" if peak is None else f"peak {peak / 1e9:.2f} GB"
            print(f"Length {length}: {name} {found}", flush=True)
            return peak is not None

        stop = min(self.longest, positions or self.longest)
        return {"longest": longest_that_fits(fits, min(self.start, stop), stop, self.resolution), "probes": probes}

    def summary(self) -> dict[str, Any]:
        """See `Measurement.summary`: the block `prefill_memory`."""
        return self._measured


class _Gpu:
    """Tries lengths in this process: CUDA says no without harm."""

    def __init__(self, model: Any, pruner: PromptPruner | None, devices: list[torch.device]) -> None:
        self.model, self.pruner, self.devices = model, pruner, devices

    def peak(self, length: int) -> int | None:
        """Peak bytes of tensors on all devices, weights included; None when the length does not fit."""
        torch.cuda.empty_cache()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            _read(self.model, self.pruner, length)
            for device in self.devices:
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return None
        return sum(map(torch.cuda.max_memory_allocated, self.devices))

    def close(self) -> None:
        """Give the memory back."""
        torch.cuda.empty_cache()


class _Cpu:
    """Tries lengths in a child process that cannot have more than its limit."""

    def __init__(self, model: Any, pruner: PromptPruner | None, limit: int) -> None:
        if pruner is not None and isinstance(pruner.scorer, Learned):
            pruner = PromptPruner(pruner.scorer.unbound(), pruner.schedule)  # the child's weights are others
        pruning = None if pruner is None else (pruner.scorer, pruner.schedule)
        kernel = anatomy(model).kernel
        self.job = (model.config, kernel, model.dtype, limit, torch.get_num_threads(), pruning)
        self.child: Any = None

    def peak(self, length: int) -> int | None:
        """Peak resident bytes beyond those of an idle child, weights included; None when the length does not fit."""
        if self.child is None:
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.child = spawn.Process(target=_serve, args=(theirs, *self.job), daemon=True)
            self.child.start()
            theirs.close()
        try:
            self.pipe.send(length)
            return self.pipe.recv()
        except (EOFError, OSError):  # a library that could not cope with a failed allocation took the child down
            self.close()
            return None

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            self.pipe.close()
            self.child.join()
            self.child = None


def _serve(
    pipe: Connection,
    config: PretrainedConfig,
    kernel: str,
    dtype: torch.dtype,
    limit: int,
    threads: int,
    pruning: tuple[Scorer, Schedule] | None,
) -> None:
    """The child: a model of this shape, under the limit, reads prompts until the pipe closes."""
    torch.set_num_threads(threads)
    idle = resident_now()
    limit_process(limit)
    pruner = None if pruning is None else PromptPruner(*pruning)
    model = None
    while True:
        try:
            length = pipe.recv()
        except EOFError:
            return
        resident_now()
        try:
            if model is None:
                model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=dtype).eval()
            _read(model, pruner, length)
            pipe.send(resident_peak() - idle)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            pipe.send(None)


def _read(model: Any, pruner: PromptPruner | None, length: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=input_device(model))
    with torch.inference_mode():
        _ = read(model, ids) if pruner is None else pruned_read(model, ids, pruner)()
