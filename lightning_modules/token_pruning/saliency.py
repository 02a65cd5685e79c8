"""Stage 1: how much every prompt token matters at the pruning layers of a frozen model, over a set of texts."""

from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from common.files import check_output, inputs_of
from lightning_modules.data.tokenizer import fingerprint
from lightning_modules.loading import Dtype, check_vocabulary, load, load_config
from lightning_modules.token_pruning.anatomy import check_supported
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.samples import check_data, split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.store import SaliencyStore, check_folder
from lightning_modules.token_pruning.targets import Target


class TokenSaliency(L.LightningModule):
    """Collects saliency with ``python main.py predict``; an interrupted run goes on where it was.

    The model is frozen; only response tokens count in the loss, and only prompt tokens are stored. Values lie beside a
    key made of the sample's own tokens.

    Args:
        base: Hugging Face folder, GGUF file or hub name of the model to prune.
        folder: Where the values go.
        schedule: Says after which layers tokens are to be pruned.
        target: What is measured.
        num_samples: Stop after so many samples, all ranks together.
        response: Tokens at the end of a block of plain text that count as response.
        dtype: What the model's weights are loaded as; "auto" is what they are on disk, "fast" the same but
            float32 on processors without instructions for 16 bits.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.

    Raises:
        ValueError: ``num_samples`` or ``response`` below 1.
    """

    def __init__(
        self,
        base: str,
        folder: str,
        schedule: Schedule,
        target: Target,
        num_samples: int = 1000,
        response: int = 64,
        dtype: Dtype = "float32",
        attention: str | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 1 or response < 1:
            raise ValueError(f"num_samples and response must be at least 1, got {num_samples} and {response}")
        self.base, self.folder, self.schedule, self.target = base, Path(folder).expanduser(), schedule, target
        self.num_samples, self.response = num_samples, response
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
        self.model: Any = None
        self.skipped: Counter[str] = Counter()

    def configure_model(self) -> None:
        """Load the frozen model once."""
        if self.model is None:
            self.model = load(self.base, **self.loading).requires_grad_(False)
            self.layers = self.schedule.resolve(self.model.config.num_hidden_layers)

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what `predict` cannot do, before any text or weight is read.

        Args:
            command: Others than "predict" are not looked at.
            data: The DataModule.

        Raises:
            ValueError: A model, schedule or data that cannot be pruned; or a folder that is no place for the saliency:
                it is, contains or lies inside an input, or holds something else.
        """
        if command != "predict":
            return
        config = load_config(self.base)
        check_supported(config)
        check_data(data, config)
        layers = self.schedule.resolve(config.num_hidden_layers)
        # nothing is replaced here: parts are added to what an earlier run has collected
        check_output(self.folder, "model.folder", inputs_of(self, data), overwrite=True)
        check_folder(self.folder, {"target": self.target.describe(), "layers": layers})

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.base]

    def setup(self, stage: str) -> None:
        """Stop after the samples asked for."""
        data = self.trainer.datamodule
        batches = ceil(self.num_samples / (data.batch_size * self.trainer.world_size))
        limit = self.trainer.limit_predict_batches
        self.trainer.limit_predict_batches = batches if isinstance(limit, float) else min(limit, batches)

    def on_predict_start(self) -> None:
        """Open the store, and see what an earlier run has left in it."""
        check_data(self.trainer.datamodule, self.model.config)
        check_vocabulary(self.model, self.trainer.datamodule.tokenizer)
        self.store = SaliencyStore(self.folder, self.depends(), self.global_rank)
        if self.store.done:
            rank_zero_info(f"{len(self.store.done)} samples are in {self.folder} already")
        if self.global_rank == 0:
            self.store.begin()
        self.trainer.strategy.barrier()

    def depends(self) -> dict[str, Any]:
        """What the values depend on."""
        return {
            "target": self.target.describe(),
            "layers": self.layers,
            "tokenizer": fingerprint(self.trainer.datamodule.tokenizer),
            "base": identity_of(self.model),
        }

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> int:
        """Store the samples of a batch that are not there yet; returns how many were."""
        with torch.inference_mode(False):
            samples = split_batch(batch, self.response)
            self.skipped["without a response or a prompt"] += len(batch["input_ids"]) - len(samples.input_ids)
            keys = samples.keys()
            new = torch.tensor([key not in self.store.done for key in keys], dtype=torch.bool)
            if not new.any():
                return 0
            samples = samples.pick(new.to(samples.real.device))
            keys = [key for key, is_new in zip(keys, new.tolist(), strict=True) if is_new]
            values = self.target.values(self.model, samples, self.layers)
        return sum(self._store(key, row, samples.prompt, values) for row, key in enumerate(keys))

    def _store(self, key: str, row: int, prompt: Tensor, values: dict[int, Tensor]) -> bool:
        mine = {layer: value[row][prompt[row]] for layer, value in values.items()}
        if not all(value.isfinite().all() for value in mine.values()):
            self.skipped["not finite (half precision overflowed)"] += 1
            return False
        if any((value == 0).all() for value in mine.values()):
            self.skipped["all zero (half precision underflowed)"] += 1
            return False
        self.store.add(key, mine)
        return True

    def on_predict_end(self) -> None:
        """Write what is left and complete the index.

        Raises:
            ValueError: not one sample could be stored.
        """
        self.store.flush()
        self.trainer.strategy.barrier()
        counts = torch.tensor([self.skipped[reason] for reason in _REASONS], device=self.device)
        totals: list[int] = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        skipped = {reason: total for reason, total in zip(_REASONS, totals, strict=True) if total}
        if self.global_rank == 0:
            samples = self.store.finish(skipped)
            notes = "".join(f"; skipped {count} that are {reason}" for reason, count in skipped.items())
            rank_zero_info(
                f"saliency of {samples} samples in {self.folder}{notes}; of each, float32[tokens of the prompt] after "
                f"layers {self.layers}"
            )
            if not samples:
                raise ValueError(f"no sample could be used: {skipped or 'the data set is empty'}")


_REASONS = (
    "without a response or a prompt",
    "not finite (half precision overflowed)",
    "all zero (half precision underflowed)",
)
