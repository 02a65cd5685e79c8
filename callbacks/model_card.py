"""The trained model as a Hugging Face folder with a card that carries its run record."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch import Callback, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

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
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

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
            card = self._card(trainer, pl_module.model.config.model_type)
            pl_module.write_export(self.dirpath, state, trainer.datamodule.tokenizer, card)
        trainer.strategy.barrier()

    def _card(self, trainer: Trainer, model_type: str) -> str:
        """Markdown with the metadata block that the hub reads."""
        record: dict[str, Any] = next((r for c in trainer.callbacks if (r := getattr(c, "record", None))), {})
        data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["pare", model_type])
        rows = "\n".join(f"| {name} | {record[name]} |" for name in _CARD_FIELDS if record.get(name) is not None)
        results = f"## Training run\n\n| field | value |\n|---|---|\n{rows}\n" if rows else ""
        usage = (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n'
        )
        text = f"# {self.dirpath.parent.name or model_type}\n\nA {model_type} language model trained with Pare.\n\n"
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}{usage}\n{results}"))
