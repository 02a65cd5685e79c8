"""What training a model holds in the memory of each rank, computed from its shapes; nothing is loaded.

Counted are parameters, gradients, optimizer state, what error feedback owes, and the whole units that a sharded engine
gathers while it computes. Not counted: activations, which depend on batch and length, and what libraries take for
themselves.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.tables import Table

Engine = Literal["fsdp", "ddp"]
Residual = Literal["none", "float32", "bfloat16", "int8"]
_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
# shapes of published models, so that their size can be asked for without a download
KNOWN: dict[str, dict[str, Any]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
_FP32 = 4
_RESIDUAL_BYTES = {"none": 0.0, "float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}
_GATHERED_UNITS = 2  # the one that computes, and the next one, which is already being gathered


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: Of its shard, in fp32; all of them under DDP.
        gradients: The same of gradients.
        optimizer: Two fp32 values for each parameter of the shard (AdamW).
        residual: What error feedback owes: as long as the whole gradient on every rank.
        gathered: Whole units while they compute, and the whole gradient of one.
        start: Host memory while the model is built, at most: sharded engines keep a rank's part of what they read, one
            parameter after the other; others the whole model, in fp32.
    """

    parameters: float
    gradients: float
    optimizer: float
    residual: float
    gathered: float
    start: float

    @property
    def training(self) -> float:
        """All that is held on the device at once."""
        return self.parameters + self.gradients + self.optimizer + self.residual + self.gathered


def estimate(
    units: list[int], ranks: int, engine: Engine = "fsdp", residual: Residual = "none", gathered_bytes: int = _FP32
) -> Memory:
    """Memory of one rank.

    Args:
        units: Parameters of every unit that is sharded by itself.
        ranks: Ranks that share them.
        engine: "fsdp" shards everything (FSDP1 FULL_SHARD, FSDP2); "ddp" keeps everything on every rank.
        residual: How error feedback stores what it owes; "none" without error feedback.
        gathered_bytes: Bytes of a gathered parameter: 2 under bf16-mixed.

    Raises:
        ValueError: Fewer than one rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    whole = sum(units)
    own = whole if engine == "ddp" else sum(-(-numel // ranks) for numel in units)
    gathered = 0.0
    if engine == "fsdp" and ranks > 1:
        largest = sorted(units, reverse=True)[:_GATHERED_UNITS]
        gathered = gathered_bytes * sum(largest) + _FP32 * largest[0]
    return Memory(
        parameters=_FP32 * own,
        gradients=_FP32 * own,
        optimizer=2 * _FP32 * own,
        residual=_RESIDUAL_BYTES[residual] * whole,
        gathered=gathered,
        start=_FP32 * (own + (max(units) if engine == "fsdp" and ranks > 1 else 0)),
    )


def units_of(model: str) -> list[int]:
    """Parameters of each block and, first, of all the rest, of a known size, a Hugging Face folder or a hub name.

    Raises:
        OSError: There is no configuration of this name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model in KNOWN:
        config = AutoConfig.for_model("llama", **_LLAMA, **KNOWN[model], tie_word_embeddings=model == "llama-1b")
    else:
        config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    names = set(whole._no_split_modules or ())
    blocks = [module for module in whole.modules() if type(module).__name__ in names]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return [sum(p.numel() for p in whole.parameters()) - sum(sizes), *sizes]


def table(
    models: list[str],
    ranks: list[int],
    engine: Engine = "fsdp",
    residual: Residual = "none",
    gathered_bytes: int = _FP32,
) -> Table:
    """A row for each model and number of ranks, in GB (10⁹ bytes) on each rank."""
    rows = []
    for model in models:
        units = units_of(model)
        for count in ranks:
            held = estimate(units, count, engine, residual, gathered_bytes)
            parts = (held.parameters, held.gradients, held.optimizer, held.residual, held.gathered, held.training)
            name = model if model in KNOWN else Path(model).name
            rows.append([name, f"{sum(units) / 1e9:.2f} B", count, *(_gb(part) for part in (*parts, held.start))])
    columns = ["parameters", "gradients", "optimizer", "residual", "gathered units", "**held**", "host, at the start"]
    return Table(["model", "size", "ranks", *columns], rows)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f}" if count >= 1e9 or not count else f"{count / 1e9:.3f}"
