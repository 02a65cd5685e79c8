"""The trained model as a Hugging Face folder with a card that carries its run record."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from common.files import check_output, inputs_of, replacing
from lightning_modules.card import card, table, usage

_CARD_FIELDS = (
    "dataset",
    "max_length",
    "steps",
    "world_size",
    "batch_size",
    "compress_method",
    "compression_ratio",
    "train_loss",
    "val_loss",
    "val_ppl",
    "tokens_per_s",
    "seed",
    "git_commit",
    "date",
)


class HFExport(Callback):
    """Exports the model at the end of fit; ``AutoModelForCausalLM.from_pretrained(dirpath)`` loads it.

    Args:
        dirpath: Destination; an earlier export is replaced once the new one is complete.
        overwrite: Replace ``dirpath`` also where Pare did not write it.
    """

    def __init__(self, dirpath: str, overwrite: bool = False) -> None:
        self.dirpath = Path(dirpath).expanduser()
        self.overwrite = overwrite

    def check_arguments(self, command: str, model: Any, data: Any) -> None:
        """Refuse a destination now that would only be refused when training is done.

        Raises:
            ValueError: See ``common.files.check_output``.
        """
        if command == "fit":
            check_output(self.dirpath, "HFExport.dirpath", inputs_of(model, data), self.overwrite)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """See ``check_arguments``; for Trainers that the command line has not asked."""
        self.check_arguments(stage, pl_module, trainer.datamodule)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather the weights on every rank, write them on rank 0."""
        if trainer.fast_dev_run:
            return
        on_cpu = trainer.strategy.root_device.type == "cpu"
        # Offloading from CPU to CPU crashes torch 2.13's FSDP1 (pytorch-lightning issue 21804).
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=not on_cpu, ignore_frozen_params=pl_module.trained_only
        )
        module: Any = trainer.strategy.model
        weights: dict[str, Any] = get_model_state_dict(module, options=options)
        if trainer.is_global_zero:
            prefix = "model."
            state = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            text = self._card(trainer, pl_module)
            inputs = inputs_of(pl_module, trainer.datamodule)
            with replacing(self.dirpath, "model", inputs, self.overwrite) as folder:
                pl_module.write_export(folder, state, trainer.datamodule.tokenizer, text)
        trainer.strategy.barrier()

    def _card(self, trainer: Trainer, pl_module: Any) -> str:
        config = pl_module.model.config
        record: dict[str, Any] = next((r for c in trainer.callbacks if (r := getattr(c, "record", None))), {})
        rows = {name: record[name] for name in _CARD_FIELDS if record.get(name) is not None}
        results = f"\n## Training run\n\n{table(rows, ('field', 'value'))}" if rows else ""
        text = f"A {config.model_type} language model trained with Pare.\n\n{usage(config)}{results}"
        base = getattr(pl_module, "base", None) or getattr(pl_module, "pretrained", None)
        return card(self.dirpath.parent.name or config.model_type, text, base, [config.model_type])
