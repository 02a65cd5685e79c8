"""One line of results.jsonl per run, and a table of it on the console."""

import re
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from callbacks.log_config import LogConfig
from callbacks.measurement import Measurement, completes_step, validate_now
from callbacks.model_card import HFExport
from common.randomness import run_seed
from common.records import record, schema

_NATIVE = {"compress_method": "native", "compress_config": {}}  # how a strategy that is not Pare's reduces gradients
_LOSS_WINDOW = 10  # optimizer steps that train_loss is the mean of
_HPARAMS = ("compress_method", "world_size", "batch_size", "max_length", "precision", "seed")
_DATA = {"dataset": "name", "max_length": "block_size", "val_stride": "val_stride", "batch_size": "batch_size"}
_RESULTS = ("val_ppl", "train_loss", "tokens_per_s", "compression_ratio", "comm_ratio")


class RunRecord(Measurement):
    """Collects every ``Measurement`` of the run at the end of fit and appends one record.

    Args:
        path: The records' file; made when missing, never edited.
        run_name: Name of the run; by default the logger's name and version.
    """

    def __init__(self, path: str = "runs/results.jsonl", run_name: str | None = None) -> None:
        self.path = Path(path)
        self.run_name = run_name
        self.record: dict[str, Any] | None = None
        self._run_id = uuid.uuid4().hex  # the same in all processes that the run is resumed in
        self._resumed: list[int] = []
        self._trained = False  # in this process
        self._loaded = False  # what an earlier process trained
        self._validated: dict[str, float] = {}
        self._validated_at: int | None = None
        self._losses: deque[Any] = deque(maxlen=_LOSS_WINDOW)
        self._log_dir: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the log folder now: asking for it is a collective, and later only rank 0 wants it.

        Raises:
            ValueError: Callbacks leave out different numbers of first steps, so that times and bytes would not belong
                together.
        """
        self._log_dir = trainer.log_dir
        warm = {type(c).__name__: c.warmup_steps for c in trainer.callbacks if hasattr(c, "warmup_steps")}
        if len(set(warm.values())) > 1:
            raise ValueError(
                f"warmup_steps differ: {', '.join(f'{name} {n}' for name, n in warm.items())}; times and bytes of a "
                "record cover the same steps, so give all of them the same number"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where an earlier process left off."""
        if trainer.global_step:
            self._resumed.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Remember the last losses; on the device, since reading each would make the host wait."""
        self._trained = True
        if completes_step(trainer) and outputs is not None:
            # modules that minimise something else than the cross entropy hand that over beside it, or None
            loss = outputs["loss"]
            if "train_loss" in outputs:
                loss = outputs["train_loss"]
            elif loss is not None and pl_module.automatic_optimization:
                loss = loss * trainer.accumulate_grad_batches  # by which Lightning has divided
            if loss is not None:
                self._losses.append(loss.detach())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the last validation: the process that ends a resumed run need not make another."""
        if not trainer.sanity_checking:
            self._validated, self._validated_at = _validated(trainer), trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run's record needs of the processes before."""
        losses = [float(loss) for loss in self._losses]
        validated = {"validated": self._validated, "validated_at": self._validated_at}
        return {"run_id": self._run_id, "resumed": self._resumed, "losses": losses, **validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self._loaded = True
        self._run_id, self._resumed = state_dict["run_id"], list(state_dict["resumed"])
        self._validated, self._validated_at = state_dict["validated"], state_dict.get("validated_at")
        self._losses.extend(state_dict["losses"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record, on rank 0; not a second one for a run that had been finished before."""
        if self._loaded and not self._trained and not trainer.fast_dev_run:
            self._validate_once_more(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if self._say_nothing_to_do(trainer):
            return
        progress = {
            "run_id": self._run_id,
            "steps": trainer.global_step,
            "resumed_at": self._resumed,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
        self.write(trainer, pl_module, trainer.datamodule, progress | self._measured(trainer), training=True)

    def _validate_once_more(self, trainer: Trainer) -> None:
        """Run the validation after the last step, where a kill came between that step's checkpoint and it.

        The loop is done and Lightning leaves it out, so that the record would have an earlier step's perplexity.
        """
        loop = trainer.fit_loop.epoch_loop
        due = trainer.enable_validation and loop._should_check_val_fx(None)  # type: ignore[arg-type] # asks its type
        if due and self._validated_at != trainer.global_step:
            validate_now(trainer)

    def _say_nothing_to_do(self, trainer: Trainer) -> bool:
        """Whether there is nothing to record.

        A run that died after its last step, before its record, still has something; so has another run from the same
        checkpoint, which has its run_id but was told otherwise.
        """
        step, config = trainer.global_step, _config(trainer)
        if not self._trained and not self._loaded:
            print(f"nothing to record: no step was trained (step {step})")
            return True
        known = record.read(self.path)[0] if self.path.is_file() else []
        mine = [one for one in known if one.get("run_id") == self._run_id and one.get("steps") == step]
        if self._trained:
            mine = [one for one in mine if config and _same_run(one.get("config"), config)]
        if mine:
            self.record = mine[-1]  # for the model card
            print(f"nothing to do: the run has reached step {step} before; its record stays as it is")
        return bool(mine)

    def write(
        self, trainer: Trainer, pl_module: LightningModule, data: Any, measured: dict[str, Any], training: bool = False
    ) -> None:
        """Append one record: what ran and where, and the fields ``measured``.

        Args:
            trainer: The Trainer.
            pl_module: The module, which may have a ``describe()``, as the strategy may.
            data: The datamodule.
            measured: Fields of the record; they win.
            training: The record of a ``fit``, in which what was not measured is null. Others do not name it.
        """
        fields = {
            **(dict.fromkeys(schema.REQUIRED) | _NATIVE if training else {}),
            **self._identity(trainer, pl_module, data),
            **record.link(),
            **record.stamp(),
            **measured,
        }
        record.validate(fields, training)
        record.append(self.path, fields)
        self.record = fields
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                choices = {name: fields.get(name) for name in _HPARAMS}
                results = {f"hp/{name}": fields[name] for name in _RESULTS if fields.get(name) is not None}
                logger.log_hyperparams(choices | (fields.get("compress_config") or {}), metrics=results)

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``: the losses."""
        losses = [float(loss) for loss in self._losses]
        return {**self._validated, **({"train_loss": sum(losses) / len(losses)} if losses else {})}

    @staticmethod
    def _measured(trainer: Trainer) -> dict[str, Any]:
        """What all measuring callbacks of the run have to say."""
        summaries = [c.summary() for c in trainer.callbacks if isinstance(c, Measurement)]
        return {name: value for fields in summaries for name, value in fields.items() if value is not None}

    def _identity(self, trainer: Trainer, pl_module: LightningModule, data: Any) -> dict[str, Any]:
        """What ran: names, sizes, seed, configuration; strategy and module describe themselves."""
        return {
            "kind": "run",
            "run_name": self.run_name or _logger_name(trainer),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "seed": run_seed(),
            "config": _config(trainer),
            **_described(trainer.strategy, {"strategy": type(trainer.strategy).__name__}),
            **_described(pl_module, {"model": _name(pl_module)}),
            **{field: getattr(data, name) for field, name in _DATA.items() if getattr(data, name, None) is not None},
        }

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the record of a validation that measured something; show the result once all has been written."""
        measuring = any(isinstance(c, Measurement) and c.during_validate for c in trainer.callbacks)
        if stage == "validate" and measuring and trainer.is_global_zero:
            self.write(trainer, pl_module, trainer.datamodule, self._measured(trainer))
        if stage == "fit" and self.record is not None and trainer.is_global_zero:
            Console().print(_table(self.record, self._places(trainer)))

    def _places(self, trainer: Trainer) -> dict[str, str]:
        exports = [str(c.dirpath) for c in trainer.callbacks if isinstance(c, HFExport)]
        return {"log": str(self._log_dir), "record": str(self.path), **({"model": exports[0]} if exports else {})}


def _described(part: Any, default: dict[str, Any]) -> dict[str, Any]:
    """What a strategy or module says of itself; ``default`` for one that is not Pare's."""
    return part.describe() if hasattr(part, "describe") else default


def _config(trainer: Trainer) -> str | None:
    return next((c.text() for c in trainer.callbacks if isinstance(c, LogConfig)), None)


def _same_run(known: str | None, config: str) -> bool:
    """Whether two configurations differ in nothing but where they went on from."""
    known, config = (re.sub(r"^ckpt_path:.*\n?", "", text or "", flags=re.MULTILINE) for text in (known, config))
    return known == config


def _name(pl_module: LightningModule) -> str:
    config = getattr(getattr(pl_module, "model", None), "config", None)
    return getattr(config, "model_type", type(pl_module).__name__)


def _validated(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {name.replace("/", "_"): float(metrics[name]) for name in ("val/loss", "val/ppl") if name in metrics}


def _logger_name(trainer: Trainer) -> str:
    logger = trainer.logger
    version = getattr(logger, "version", None)
    return f"{logger.name}/{version}" if logger is not None and logger.name else "unnamed"


def _table(fields: dict[str, Any], places: dict[str, str]) -> Table:
    """The headline numbers; what was not measured is not shown as 0."""

    def show(name: str, text: str) -> str:
        return text.format(fields[name]) if fields.get(name) is not None else "not recorded"

    table = Table(
        title=f"{fields['run_name']}: {fields['compress_method'] or 'native'} × {fields['world_size']} ranks",
        title_style="",
    )
    table.add_column("what")
    table.add_column("value", justify="right", overflow="fold")
    table.add_row("validation perplexity", show("val_ppl", "{:.2f}"))
    table.add_row("training loss (last steps)", show("train_loss", "{:.3f} nats/token"))
    table.add_row("tokens per second", show("tokens_per_s", "{:,.0f}"))
    table.add_row("step time, median", show("step_time_ms_p50", "{:,.0f} ms"))
    if fields.get("compression_ratio") is not None:
        steps = fields["steps_measured"]
        sent, ideal = fields["bytes_compressed_total"] / steps / 1e6, fields["bytes_raw_total"] / steps / 1e6
        table.add_row("gradient bytes sent per step and rank", f"{sent:,.2f} MB")
        table.add_row("ideal fp32 ring", f"{ideal:,.2f} MB ({fields['compression_ratio']:.2f}× as much)")
        table.add_row(
            "parameter bytes sent per step and rank", f"{fields['bytes_parameters_total'] / steps / 1e6:,.2f} MB"
        )
        table.add_row("share of step on the wire (waiting included)", show("comm_ratio", "{:.1%}"))
    for what, place in places.items():
        table.add_row(what, place)
    return table
