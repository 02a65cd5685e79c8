"""Perplexity on text of another kind, beside that of the validation text."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.data.corpus import find_corpus
from lightning_modules.data.packing import pack_blocks
from lightning_modules.data.readers import document_text, read_records
from lightning_modules.data.tokenizer import Encoder
from lightning_modules.metrics import WeightedMean
from lightning_modules.perplexity import perplexity


class OtherText(Callback):
    """Logs ``val/ppl_NAME`` at every validation, for texts that are neither trained nor validated on.

    What a short training gives on text like its own says little: the same model may have become worse elsewhere. Blocks
    are as long as the data's, do not overlap, and are the same on every rank.

    Args:
        texts: File (.json, .jsonl, .txt) or folder of each text, by name.
        max_blocks: Use only the first so many blocks of each.
    """

    def __init__(self, texts: dict[str, str], max_blocks: int = 32) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        if wrong := [name for name in texts if not name.isidentifier()]:
            raise ValueError(f"OtherText.texts: {wrong[0]!r} is no name of letters, digits and underscores")
        self.texts = {name: Path(path).expanduser() for name, path in texts.items()}
        self.max_blocks = max_blocks
        self._batches: dict[str, list[dict[str, Tensor]]] = {}

    def check_arguments(self, command: str, model: Any, data: Any) -> None:
        """Refuse texts that are not there.

        Raises:
            FileNotFoundError: There is no such file or folder.
            ValueError: See ``find_corpus``; or the module has no perplexity of its own.
        """
        for name, path in self.texts.items():
            if not path.exists():
                raise FileNotFoundError(f"OtherText.texts.{name}: no such file or folder: {path}")
            find_corpus(path)
        if not hasattr(model, "val_nll"):
            raise ValueError(f"OtherText: {type(model).__name__} measures no perplexity to measure on other texts")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the texts.

        Raises:
            FileNotFoundError: See ``check_arguments``.
            ValueError: A text is shorter than one block.
        """
        if stage not in ("fit", "validate"):
            return
        self.check_arguments(stage, pl_module, trainer.datamodule)
        data: Any = trainer.datamodule
        encoder = Encoder(data.tokenizer)
        self._batches = {
            name: _blocks(name, path, encoder, data.block_size, data.batch_size, self.max_blocks)
            for name, path in self.texts.items()
        }

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure, the way that validation batches go: in the run's precision, through the strategy."""
        if trainer.sanity_checking:
            return
        own = pl_module.val_nll
        try:
            for name, batches in self._batches.items():
                pl_module.val_nll = WeightedMean().to(pl_module.device)
                for number, batch in enumerate(batches):
                    trainer.strategy.validation_step(trainer.strategy.batch_to_device(batch), number)
                found = perplexity(pl_module.val_nll.compute().item())
                self.log(f"val/ppl_{name}", found, sync_dist=True)
        finally:
            pl_module.val_nll = own


def _blocks(
    name: str, path: Path, encoder: Encoder, block_size: int, batch_size: int, count: int
) -> list[dict[str, Tensor]]:
    """The first blocks of a text, as batches."""
    tokens, wanted, pieces = 0, count * block_size, []
    for record, where, _ in read_records(find_corpus(path).files):
        pieces.append(encoder([document_text(record, where)]))
        tokens += len(pieces[-1])
        if tokens >= wanted:
            break
    blocks, _ = pack_blocks(pieces, block_size)
    if not len(blocks):
        raise ValueError(
            f"OtherText.texts.{name}: {path} has {tokens:,} tokens, less than one block of {block_size:,}; give more"
        )
    ids = torch.from_numpy(blocks[:count]).long()
    return [{"input_ids": part, "labels": part} for part in ids.split(batch_size)]
