"""Training runs of the smallest model through every engine, started as a user starts them."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.experiments.runs import fit
from bench.gpu.setting import Setting, found

_CONFIG = "configs/pretraining/gpt2_tiny.yaml"
_SMALL: dict[str, Any] = {
    "model.config": "{n_layer: 2, n_embd: 64, n_head: 2}",
    "model.warmup_steps": 3,
    "data.sources": "[topics]",  # Python's own documentation
    "data.vocab_size": 300,
    "data.block_size": 32,
    "data.batch_size": 2,
    "data.max_val_blocks": 8,
    "trainer.max_steps": 12,
    "trainer.val_check_interval": 12,
}
_ENGINES: dict[str, dict[str, Any]] = {
    "CompressedFSDP": {},
    "CompressedFSDP2": {"trainer.strategy.parameter_compressor": "Int8"},
    "CompressedDDP": {},
    "CompressedDiLoCo": {"trainer.strategy.sync_every": 4},
    "ShardedDiLoCo": {"trainer.strategy.sync_every": 4, "trainer.strategy.replicas": 2},
}
_LEAST_RANKS = {"ShardedDiLoCo": 4}  # two replicas that shard
_MOST_ERROR = 0.02  # of int8 gradients, relative
_NEAR = "and gradients are off by less than 2 %"
_RANK = {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_START_S = 15.0  # of a check's time, for Python and torch to start


def train_all(setting: Setting, ranks: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """Train with int8 gradients through every engine that so many ranks can be, each in processes of its own.

    One that fails or hangs stops no other.

    Args:
        setting: Where to train.
        ranks: Processes; a single one exchanges no gradients.
        limit_s: Seconds that the check has; what is left of them is shared by the engines that are left.
    """
    until = time.monotonic() + limit_s - _START_S
    fitting = [engine for engine in _ENGINES if ranks >= _LEAST_RANKS.get(engine, 1)]
    engines = ["CompressedFSDP2"] if setting.tiny else fitting
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        _forget_launcher()
        for done, engine in enumerate(engines):
            timeout_s = (until - time.monotonic()) / (len(engines) - done)
            yield _train(setting, engine, ranks, Path(folder) / engine, timeout_s)


def _forget_launcher() -> None:
    """Leave nothing of a cluster's in the environment: the ranks that are started here would take it for theirs."""
    for name in list(os.environ):
        if name in _RANK or name.startswith(("SLURM_", "TORCHELASTIC_")):
            del os.environ[name]


def _train(setting: Setting, engine: str, ranks: int, folder: Path, timeout_s: float) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    chosen = {"trainer.accelerator": setting.device.type, "trainer.devices": ranks, **_SMALL}
    chosen |= {"trainer.strategy.class_path": engine, "trainer.strategy.compressor": "Int8", **_ENGINES[engine]}
    chosen |= {"trainer.strategy.kernels": "triton"} if on_gpu else {}
    what = f"{engine}, int8 gradients, {ranks} ranks" if ranks > 1 else f"{engine}, 1 rank: exchanges no gradients"
    arguments = [f"--{name}={value}" for name, value in chosen.items()]
    try:
        record = fit(folder, _CONFIG, *arguments, timeout_s=timeout_s).record
    except (RuntimeError, OSError, StopIteration) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = lines[0 if isinstance(error, TimeoutError) else -1][:300]
        return found(engine, f"{what}: {said}", 0, "", "trains", False, output=str(error)[-3000:])
    apart, loss = record.get("grad_rel_error"), record.get("val_loss")
    right = record.get("steps") == 12 and record.get("world_size") == ranks and loss is not None and loss < 100
    target = "trains"
    if ranks > 1:
        right, target = right and apart is not None and apart < _MOST_ERROR, f"{target}, {_NEAR}"
    names = ("val_loss", "grad_rel_error", "step_time_ms_p50", "compression_ratio", "codec_backend", "comm_ratio")
    numbers = {name: record.get(name) for name in names}
    return found(engine, what, int(right), "", target, right, **numbers)
