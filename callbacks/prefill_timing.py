"""What token pruning gains: prefill with and without it, in turns, in one process, on one model."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from callbacks.measurement import Measurement
from common.measure.memory import attention_kernels, peak_bytes
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from common.progress import stage
from common.tables import Table
from lightning_modules.token_pruning.anatomy import anatomy, placement
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule, preset
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.scorers.learned import Learned
from lightning_modules.token_pruning.scorers.random import Random

_TOLERANCE = 1.3  # attention runs at a lower rate than matrix products, so a little above the FLOP bound is possible


class PrefillTiming(Measurement):
    """Times the prefill of validation text in `validate`, once for each length.

    Four arms take turns: the unpruned model, the pruned one, the pruned one keeping everything (pure overhead), and one
    pruned by random scores (what scoring costs). All compute one token's logits, fill a fresh cache, and run the same
    attention kernel, which is looked up and not believed. Hooks, scorer, selection and gathering are inside the time.

    With `presets` there is a pruned arm for each of them; random scores and keeping everything take the last.

    Args:
        scorer: Which tokens to keep; by default the module's trained pruner.
        schedule: After which layers and how many; by default the module's.
        pruner: What `calibrate` found, in place of both: its folder.
        presets: Schedules by name, in place of `schedule`: "keep09", "keep08", "keep07", "sdtp09", … (see `preset`).
        lengths: Prompt lengths in tokens. Left out, with a reason, where the text, the positions or the memory end.
        repeats: Timed rounds per length.
        warmup: Untimed rounds before them, at every length.
    """

    during_validate = True

    def __init__(
        self,
        scorer: Scorer | None = None,
        schedule: Schedule | None = None,
        pruner: str | None = None,
        presets: list[str] = [],  # noqa: B006
        lengths: list[int] = [1024, 2048, 4096, 8192],  # noqa: B006 (jsonargparse shows it)
        repeats: int = 20,
        warmup: int = 3,
    ) -> None:
        if not lengths or min(lengths) < 2 or repeats < 1 or warmup < 0:
            raise ValueError(f"lengths ≥ 2, repeats ≥ 1, warmup ≥ 0, got {lengths}, {repeats} and {warmup}")
        self.scorer, self.schedule, self.base = given(scorer, schedule, pruner)
        if presets and self.schedule:
            raise ValueError("presets are schedules: leave out schedule and pruner")
        self.presets = {name: preset(name) for name in presets}
        self.lengths = sorted(lengths)
        self.repeats, self.warmup = repeats, warmup
        self._measured: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print a line for each length and a table of all, and log `prefill/…` with the length as the step.

        Raises:
            ValueError: More than one process, or no scorer and schedule given and none in the module.
            RuntimeError: The arms run different attention kernels.
        """
        if trainer.state.fn != "validate":
            return
        if trainer.world_size > 1:
            raise ValueError(f"PrefillTiming measures one process, not {trainer.world_size}: set trainer.devices to 1")
        last = next(reversed(self.presets.values()), None)
        scorer, schedule = chosen(self.scorer, self.schedule or last, pl_module)
        pruned = {name: (scorer, one) for name, one in (self.presets or {"pruned": schedule}).items()}
        model: Any = pl_module.model
        for pair in pruned.values():
            PromptPruner(*pair, base=self.base).check(model.config)
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
                        rows, block["kernels"] = self._time(model, devices, text[:length], pruned)
                        block["arms"] += rows
                        _tell(trainer, rows, list(pruned))
                    except torch.OutOfMemoryError:
                        reason = "does not fit into the GPU's memory"
                        torch.cuda.empty_cache()
                if reason is not None:
                    skipped[str(length)] = reason
                    print(f"Length {length}: left out, {reason}")
                show(sum(self.lengths[: number + 1]))
        block["schedules"] = {
            name: {"layers": one.resolve(model.config.num_hidden_layers), "keep": one.tokens or one.keep}
            for name, (_, one) in pruned.items()
        }
        self._measured = {"prefill": block | {"skipped": skipped}, **_doubts(block)}
        Console().print(summary_table(block["arms"], list(pruned)))

    def _time(
        self, model: Any, devices: list[torch.device], ids: Tensor, pruned: dict[str, tuple[Scorer, Schedule]]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """All arms at one length, all with the model placed as it is, and the attention kernels that they run."""
        ids = ids[None].to(devices[0])
        scorer, schedule = list(pruned.values())[-1]
        whole = everything(schedule, model.config.num_hidden_layers)
        setups = {**pruned, "keep-1.0": (scorer, whole), "random": (Random(), schedule)}
        arms: dict[str, Callable[[], object]] = {"baseline": lambda: read(model, ids)}
        for name, setup in setups.items():
            arms[name] = pruned_read(model, ids, PromptPruner(*setup, base=self.base))
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


def given(
    scorer: Scorer | None, schedule: Schedule | None, pruner: str | None
) -> tuple[Scorer | None, Schedule | None, dict[str, Any] | None]:
    """The scorer and schedule that a callback was given, directly or by the folder of a calibrated pruner.

    Returns:
        These, and the identity of the only model that they serve; None for any.

    Raises:
        FileNotFoundError: No such pruner.
        ValueError: Both, or see `PromptPruner.from_file`.
    """
    if pruner is None:
        return scorer, schedule, None
    if scorer or schedule:
        raise ValueError("pruner has its own scorer and schedule: leave these out")
    calibrated = PromptPruner.from_file(pruner)
    return calibrated.scorer, calibrated.schedule, calibrated.base


def chosen(scorer: Scorer | None, schedule: Schedule | None, pl_module: Any) -> tuple[Scorer, Schedule]:
    """The scorer and schedule of a callback, those of the module where it has none of its own.

    Raises:
        ValueError: Neither has one.
    """
    trained, own = getattr(pl_module, "pruner", None), getattr(pl_module, "schedule", None)
    scorer, schedule = scorer or (Learned(trained) if trained is not None else None), schedule or own
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


def summary_table(rows: list[dict[str, Any]], pruned: list[str]) -> Table:
    """Prefill times in the columns that SDTP's scripts print, a mean for each schedule, and the FLOP bound.

    Args:
        rows: Of the record's block, see `PrefillTiming`.
        pruned: Names of the pruned arms.
    """
    headers = ["arm", "length", "baseline (s)", "pruned (s)", "speed-up", "latency reduction", "FLOP bound"]
    plain = {row["length"]: row["ms_median"] for row in rows if row["arm"] == "baseline"}
    body: list[list[Any]] = []
    for name in pruned:
        mine = [row for row in rows if row["arm"] == name]
        lines: list[list[Any]] = [
            [row["length"], plain[row["length"]] / 1e3, row["ms_median"] / 1e3, up, 1 - 1 / up, row["bound"]]
            for row in mine
            for up in [row["speedup"]]
        ]
        if len(lines) > 1:
            lines.append(["mean", *(sum(column) / len(lines) for column in list(zip(*lines, strict=True))[1:])])
        for length, baseline, seconds, speedup, reduction, bound in lines:
            cells = [f"{baseline:.4f}", f"{seconds:.4f}", f"{speedup:.2f}×", f"{reduction:.1%}", f"{bound:.2f}×"]
            body.append([name, length, *cells])
    return Table(headers, body)


def _tell(trainer: Trainer, rows: list[dict[str, Any]], names: list[str]) -> None:
    arms = {row["arm"]: row for row in rows}
    pruned, length = [arms[name] for name in names], rows[0]["length"]
    each = " ".join(
        f"{row['arm']}={row['ms_median'] / 1e3:.4f}s speedup={row['speedup']:.2f}x bound={row['bound']:.2f}x"
        for row in pruned
    )
    print(
        f"Length {length}: baseline={arms['baseline']['ms_median'] / 1e3:.4f}s {each} "
        f"keep-1.0={arms['keep-1.0']['speedup']:.3f}x random={arms['random']['speedup']:.2f}x",
        flush=True,
    )
    metrics = {f"prefill/{name}_ms": row["ms_median"] for name, row in arms.items()}
    for row in pruned:
        end = "" if len(pruned) == 1 else f"_{row['arm']}"
        metrics |= {f"prefill/speedup{end}": row["speedup"], f"prefill/bound{end}": row["bound"]}
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
