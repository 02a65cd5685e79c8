"""One line of results.jsonl per run, and a table of it on the console."""

import os
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from callbacks.log_config import LogConfig
from callbacks.measurement import Measurement, completes_step
from callbacks.model_card import HFExport
from common.records import record, schema

_LOSS_WINDOW = 10  # optimizer steps that train_loss is the mean of
_HPARAMS = ("compress_method", "world_size", "batch_size", "max_length", "precision", "seed")
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
        self._losses: deque[Any] = deque(maxlen=_LOSS_WINDOW)
        self._log_dir: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the log folder now: asking for it is a collective, and later only rank 0 wants it."""
        self._log_dir = trainer.log_dir

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Remember the last losses; on the device, since reading each would make the host wait."""
        if completes_step(trainer) and outputs is not None:
            # modules that minimise something else than the cross entropy hand that over beside it
            loss = outputs.get("train_loss", outputs["loss"])
            if loss is not None:
                self._losses.append(loss.detach())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record, on rank 0."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.write(trainer, pl_module, trainer.datamodule, self._measured(trainer))

    def write(self, trainer: Trainer, pl_module: LightningModule, data: Any, measured: dict[str, Any]) -> None:
        """Append one record: what ran and where, and the fields ``measured``."""
        fields = {
            **dict.fromkeys(schema.REQUIRED),
            **self._identity(trainer, pl_module, data),
            **record.stamp(),
            **measured,
        }
        record.validate(fields)
        record.append(self.path, fields)
        self.record = fields
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                choices = {name: fields[name] for name in _HPARAMS}
                results = {f"hp/{name}": fields[name] for name in _RESULTS if fields[name] is not None}
                logger.log_hyperparams(choices | fields["compress_config"], metrics=results)

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``: the losses."""
        losses = [loss.item() for loss in self._losses]
        return {"train_loss": sum(losses) / len(losses)} if losses else {}

    @staticmethod
    def _measured(trainer: Trainer) -> dict[str, Any]:
        """What all measuring callbacks of the run have to say."""
        summaries = [c.summary() for c in trainer.callbacks if isinstance(c, Measurement)]
        return {name: value for fields in summaries for name, value in fields.items() if value is not None}

    def _identity(self, trainer: Trainer, pl_module: LightningModule, data: Any) -> dict[str, Any]:
        """What ran: names, sizes, seed, configuration, and the last validation."""
        compressor = getattr(trainer.strategy, "compressor", None)
        parameters = getattr(trainer.strategy, "parameter_compressor", None)
        hf = getattr(pl_module, "model", None)
        metrics = trainer.callback_metrics
        config = next((c for c in trainer.callbacks if isinstance(c, LogConfig)), None)
        return {
            "kind": "run",
            "run_name": self.run_name or _logger_name(trainer),
            "world_size": trainer.world_size,
            "model": getattr(getattr(hf, "config", None), "model_type", type(pl_module).__name__),
            "model_parameters": getattr(pl_module, "parameter_count", None),
            "dataset": getattr(data, "name", None),
            "max_length": getattr(data, "block_size", None),
            "val_stride": getattr(data, "val_stride", None),
            "batch_size": getattr(data, "batch_size", None),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "strategy": type(trainer.strategy).__name__,
            "sharding_strategy": getattr(getattr(trainer.strategy, "sharding_strategy", None), "name", None),
            "compress_method": compressor.name if compressor is not None else "native",
            "compress_config": compressor.config() if compressor is not None else {},
            "parameter_compress_method": parameters.name if parameters is not None else None,
            "parameter_compress_config": parameters.config() if parameters is not None else None,
            "codec_backend": getattr(trainer.strategy, "codec_backend", None),
            "replicas": getattr(trainer.strategy, "replicas", None),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "steps": trainer.global_step,
            "val_loss": float(metrics["val/loss"]) if "val/loss" in metrics else None,
            "val_ppl": float(metrics["val/ppl"]) if "val/ppl" in metrics else None,
            "config": config.text() if config is not None else None,
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


def _logger_name(trainer: Trainer) -> str:
    logger = trainer.logger
    version = getattr(logger, "version", None)
    return f"{logger.name}/{version}" if logger is not None and logger.name else "unnamed"


def _table(fields: dict[str, Any], places: dict[str, str]) -> Table:
    """The headline numbers; what was not measured is not shown as 0."""

    def show(name: str, text: str) -> str:
        return text.format(fields[name]) if fields.get(name) is not None else "not recorded"

    table = Table(
        title=f"{fields['run_name']}: {fields['compress_method']} × {fields['world_size']} ranks", title_style=""
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
