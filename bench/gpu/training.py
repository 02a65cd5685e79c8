"""Training runs of the smallest model through every engine, started as a user starts them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def train_all(setting: Setting, ranks: int) -> Iterator[dict[str, Any]]:
    """Train with int8 gradients through every engine that so many ranks can be, each in processes of its own.

    One that fails stops no other.
    """
    fitting = [engine for engine in _ENGINES if ranks >= _LEAST_RANKS.get(engine, 1)]
    engines = ["CompressedFSDP2"] if setting.tiny else fitting
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            yield _train(setting, engine, ranks, Path(folder) / engine)


def _train(setting: Setting, engine: str, ranks: int, folder: Path) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    chosen = {"trainer.accelerator": setting.device.type, "trainer.devices": ranks, **_SMALL}
    chosen |= {"trainer.strategy.class_path": engine, "trainer.strategy.compressor": "Int8", **_ENGINES[engine]}
    chosen |= {"trainer.strategy.kernels": "triton"} if on_gpu else {}
    what = f"{engine}, int8 gradients, {ranks} {'rank' if ranks == 1 else 'ranks'}"
    try:
        record = fit(folder, _CONFIG, *(f"--{name}={value}" for name, value in chosen.items())).record
    except (RuntimeError, OSError, StopIteration) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return found(engine, f"{what}: {said[-1][:300]}", 0, "", "trains", False, output=str(error)[-3000:])
    apart, loss = record.get("grad_rel_error"), record.get("val_loss")
    right = record.get("steps") == 12 and loss is not None and loss < 100 and (apart is None or apart < _MOST_ERROR)
    names = ("val_loss", "grad_rel_error", "step_time_ms_p50", "compression_ratio", "codec_backend", "comm_ratio")
    numbers = {name: record.get(name) for name in names}
    return found(engine, what, int(right), "", "trains, and gradients are off by less than 2 %", right, **numbers)
