"""What token pruning gains: prefill with and without it, in turns, in one process, on one model."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import DynamicCache

from callbacks.measurement import Measurement
from common.measure.memory import attention_kernels, peak_bytes
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from common.progress import stage
from lightning_modules.token_pruning.anatomy import anatomy, placement
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.scorers.mlp import MLP
from lightning_modules.token_pruning.scorers.random import Random

_TOLERANCE = 1.3  # attention runs at a lower rate than matrix products, so a little above the FLOP bound is possible


class PrefillTiming(Measurement):
    """Times the prefill of validation text in `validate`, once for each length.

    Four arms take turns: the unpruned model, the pruned one, the pruned one keeping everything (pure overhead), and one
    pruned by random scores (what scoring costs). All compute one token's logits, fill a fresh cache, and run the same
    attention kernel, which is looked up and not believed. Hooks, scorer, selection and gathering are inside the time.

    Args:
        scorer: Which tokens to keep; by default the module's trained pruner.
        schedule: After which layers and how many; by default the module's.
        lengths: Prompt lengths in tokens. Left out, with a reason, where the text, the positions or the memory end.
        repeats: Timed rounds per length.
        warmup: Untimed rounds before them, at every length.
    """

    during_validate = True

    def __init__(
        self,
        scorer: Scorer | None = None,
        schedule: Schedule | None = None,
        lengths: list[int] = [1024, 2048, 4096, 8192],  # noqa: B006 (jsonargparse shows it)
        repeats: int = 20,
        warmup: int = 3,
    ) -> None:
        if not lengths or min(lengths) < 2 or repeats < 1 or warmup < 0:
            raise ValueError(f"lengths ≥ 2, repeats ≥ 1, warmup ≥ 0, got {lengths}, {repeats} and {warmup}")
        self.scorer, self.schedule, self.lengths = scorer, schedule, sorted(lengths)
        self.repeats, self.warmup = repeats, warmup
        self._measured: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print a line for each length, and log `prefill/…` with the length as the step.

        Raises:
            ValueError: More than one process, or no scorer and schedule given and none in the module.
            RuntimeError: The arms run different attention kernels.
        """
        if trainer.state.fn != "validate":
            return
        if trainer.world_size > 1:
            raise ValueError(f"PrefillTiming measures one process, not {trainer.world_size}: set trainer.devices to 1")
        scorer, schedule = chosen(self.scorer, self.schedule, pl_module)
        model: Any = pl_module.model
        text, skipped = validation_text(trainer, max(self.lengths)), {}
        block: dict[str, Any] = {"arms": [], "keep": schedule.tokens or schedule.keep}
        block |= {"layers": schedule.resolve(model.config.num_hidden_layers)}
        block |= {"scorer": {"name": scorer.name, **scorer.config()}, "placement": placed(model)}
        with stage("Timing prefill", sum(self.lengths), "tokens") as show:
            for number, length in enumerate(self.lengths):
                reason = _too_long(model, length, len(text))
                if reason is None:
                    try:
                        devices = [torch.device(name) for name in block["placement"]["devices"]]
                        rows, block["kernels"] = self._time(model, devices, text[:length], scorer, schedule)
                        block["arms"] += rows
                        _tell(trainer, rows)
                    except torch.OutOfMemoryError:
                        reason = "does not fit into the GPU's memory"
                        torch.cuda.empty_cache()
                if reason is not None:
                    skipped[str(length)] = reason
                    print(f"Length {length}: left out, {reason}")
                show(sum(self.lengths[: number + 1]))
        self._measured = {"prefill": block | {"skipped": skipped}, **_doubts(block)}

    def _time(
        self, model: Any, devices: list[torch.device], ids: Tensor, scorer: Scorer, schedule: Schedule
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The four arms at one length, all with the model placed as it is, and the attention kernels that they run."""
        ids = ids[None].to(devices[0])
        whole = everything(schedule, model.config.num_hidden_layers)
        setups = {"pruned": (scorer, schedule), "keep-1.0": (scorer, whole), "random": (Random(), schedule)}
        arms: dict[str, Callable[[], object]] = {"baseline": lambda: read(model, ids)}
        for name, setup in setups.items():
            arms[name] = pruned_read(model, ids, PromptPruner(*setup))
        with torch.inference_mode():
            kernels = {name: attention_kernels(arm) for name, arm in arms.items()}
            if len(set(map(tuple, kernels.values()))) > 1:
                raise RuntimeError(f"arms run different attention kernels, so their times do not compare: {kernels}")
            times = interleaved(arms, self.repeats, self.warmup)
            peaks = {name: peak_bytes(arm, *devices) for name, arm in arms.items()}
        length, cost, rows = ids.shape[1], Cost.of(model), []
        for name in arms:
            stats, faster = percentiles(times[name]), ratio_with_spread(times["baseline"], times[name])
            rows.append(
                {
                    "length": length,
                    "arm": name,
                    "ms_median": stats["p50"],
                    "ms_iqr": stats["iqr"],
                    "speedup": faster["ratio"],
                    "speedup_spread": faster["spread"],
                    "bound": cost.bound(length, setups[name][1], setups[name][0]) if name in setups else 1.0,
                    "peak_bytes": peaks[name],
                }
            )
        return rows, kernels["baseline"]

    def summary(self) -> dict[str, Any]:
        """See `Measurement.summary`: the block `prefill`."""
        return self._measured


def chosen(scorer: Scorer | None, schedule: Schedule | None, pl_module: Any) -> tuple[Scorer, Schedule]:
    """The scorer and schedule of a callback, those of the module where it has none of its own.

    Raises:
        ValueError: Neither has one.
    """
    trained, own = getattr(pl_module, "pruner", None), getattr(pl_module, "schedule", None)
    scorer, schedule = scorer or (MLP(trained) if trained is not None else None), schedule or own
    if scorer is None or schedule is None:
        raise ValueError(f"{type(pl_module).__name__} has no trained pruner and schedule: give scorer and schedule")
    return scorer, schedule


def placed(model: Any) -> dict[str, list[str]]:
    """`placement`, with a warning where weights are copied to a device again in every forward pass."""
    found = placement(model)
    if found["offloaded"]:
        rank_zero_warn(f"offloaded to CPU or disk, so times measure transfers: {', '.join(found['offloaded'])}")
    return found


def everything(schedule: Schedule, model_layers: int) -> Schedule:
    """The same stages, but no token is dropped."""
    whole = schedule.keeping(1.0)
    whole.layers, whole.of = schedule.resolve(model_layers), "free"
    return whole


def read(model: Any, ids: Tensor) -> object:
    """Prefill as generation does it: a fresh cache, and logits of the last token alone."""
    return model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)


def pruned_read(model: Any, ids: Tensor, pruner: PromptPruner) -> Callable[[], object]:
    """`read` by a pruned model, entering and leaving the pruning context included."""

    def call() -> object:
        with pruner.prefill(model):
            return read(model, ids)

    return call


def validation_text(trainer: Trainer, longest: int) -> Tensor:
    """The first tokens of the validation data, rows one after the other, without padding; int64 `[≤ longest]`."""
    parts: list[Tensor] = []
    for batch in trainer.datamodule.val_dataloader():
        rows = batch["input_ids"]
        real = batch.get("attention_mask")
        parts.append(rows.flatten() if real is None else rows[real.bool()])
        if sum(map(len, parts)) >= longest:
            break
    return torch.cat(parts)[:longest]


def _too_long(model: Any, length: int, text: int) -> str | None:
    if length > text:
        return f"the validation text has only {text} tokens (repeating it would flatter pruning)"
    longest = anatomy(model).longest
    return None if longest is None or length <= longest else f"the model has only {longest} positions"


def _tell(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    arms = {row["arm"]: row for row in rows}
    pruned, length = arms["pruned"], rows[0]["length"]
    print(
        f"Length {length}: baseline={arms['baseline']['ms_median'] / 1e3:.4f}s pruned={pruned['ms_median'] / 1e3:.4f}s "
        f"speedup={pruned['speedup']:.2f}x bound={pruned['bound']:.2f}x "
        f"keep-1.0={arms['keep-1.0']['speedup']:.3f}x random={arms['random']['speedup']:.2f}x",
        flush=True,
    )
    metrics = {f"prefill/{name}_ms": row["ms_median"] for name, row in arms.items()}
    metrics |= {"prefill/speedup": pruned["speedup"], "prefill/bound": pruned["bound"]}
    metrics |= {"prefill/overhead": 1 / arms["keep-1.0"]["speedup"] - 1}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=length)


def _doubts(block: dict[str, Any]) -> dict[str, list[str]]:
    """Reasons to distrust the block, for the record's `suspicious`."""
    found = [
        f"prefill {row['arm']} at {row['length']}: {row['speedup']:.2f}× is above its bound of {row['bound']:.2f}×"
        for row in block["arms"]
        if row["speedup"] > _TOLERANCE * row["bound"]
    ]
    if block["placement"]["offloaded"]:
        found.append(f"offloaded, so times measure transfers: {', '.join(block['placement']['offloaded'])}")
    return {"suspicious": found} if found else {}
