"""The base of every LightningModule here that trains a causal language model."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from common.names import clean_name
from common.randomness import run_seed, step_seed
from lightning_modules.distillation import distilled_loss
from lightning_modules.export import export
from lightning_modules.loading import Dtype, check_vocabulary
from lightning_modules.metrics import WeightedMean
from lightning_modules.perplexity import batch_nll, perplexity


def whole_steps(trainer: Any, lr_schedule: str) -> int:
    """Optimizer steps of a whole run.

    Raises:
        ValueError: Nothing says how many, and the learning rate's schedule needs to know.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isinf(steps):
        return int(steps)
    if lr_schedule in ("constant", "constant_with_warmup"):
        return 0  # not looked at
    raise ValueError(
        f"trainer.max_steps: the learning rate's schedule {lr_schedule!r} needs to know how long training is; give "
        "max_steps or max_epochs, beside max_time too"
    )


class CausalLM(L.LightningModule):
    """Loss, perplexity, optimizer and schedule of a Hugging Face causal language model.

    Subclasses say where the model comes from (``build_model``). Dropout and every other draw of a training step follow
    from (seed, micro-batches done, rank), so that an interrupted run continues bit for bit.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled decay of matrices and embeddings; biases and norms have none.
        beta1: AdamW's first decay rate.
        beta2: AdamW's second decay rate.
        lr_schedule: A schedule of ``transformers.get_scheduler`` ("cosine", "linear", "constant_with_warmup", …).
        warmup_steps: Optimizer steps of linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        compile: Compile every transformer block with ``torch.compile``.
        dtype: What the weights of a model that is read are loaded as; "auto" is what they are on disk, "fast" the same
            but float32 on processors without instructions for 16 bits.
        attention: Attention kernel, as transformers names it: "sdpa", "eager", "flash_attention_2", …; None takes
            transformers' choice.
    """

    trained_only = False
    """Whether ``write_export`` needs the trained weights alone."""
    starts_sharded = False
    """Whether ``build_model`` looks at no weight, so that each rank of a sharding strategy may have its rows alone."""

    def __init__(
        self,
        learning_rate: float = 6e-4,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        lr_schedule: str = "cosine",
        warmup_steps: int = 100,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        dtype: Dtype = "float32",
        attention: str | None = None,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (beta1, beta2)
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
        self.model: Any = None  # a PreTrainedModel, once configure_model has run
        self.val_nll = WeightedMean()
        self.parameter_count = 0
        self._decayed: set[str] = set()

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """Make the model, on the CPU. Called once per process, with the Trainer attached."""

    def configure_model(self) -> None:
        """Build the model once, before the strategy wraps it."""
        if self.model is not None:
            return
        self.model = self.build_model()
        check_vocabulary(self.model, getattr(self.trainer.datamodule, "tokenizer", None) if self._trainer else None)
        # After sharding every parameter is a flat slice, so what is a matrix must be noted now.
        self._decayed = {f"model.{name}" for name, p in self.model.named_parameters() if p.ndim >= 2}
        self.parameter_count = self.model.num_parameters()
        rank_zero_info(f"{self.model.config.model_type}: {self.parameter_count / 1e6:.1f} M parameters")
        if self.gradient_checkpointing:
            # transformers 5.23 renamed it; the reentrant variant does not work under FSDP
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        if self.compile_blocks:
            for block in self.model.modules():
                if type(block).__name__ in (self.model._no_split_modules or ()):
                    block.compile()

    def describe(self) -> dict[str, Any]:
        """What ran, for the run record."""
        if self.model is None:
            return {"model": type(self).__name__}
        return {"model": self.model.config.model_type, "model_parameters": self.parameter_count}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Mean next-token loss of ``input_ids [B, T]`` against ``labels [B, T]``."""
        nll, tokens = batch_nll(self.model, batch)
        loss = nll / tokens.clamp_min(1)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def distilled_step(
        self, batch: dict[str, Tensor], teacher: Any, weight: float, temperature: float = 1.0, **hidden: Any
    ) -> dict[str, Tensor]:
        """A training step with a teacher; ``train/loss`` is the cross entropy on the text, as without one.

        Args:
            batch: Text.
            teacher: See ``distilled_loss``.
            weight: The same.
            temperature: The same.
            **hidden: Its further arguments, which say what of hidden states counts.

        Returns:
            ``loss``, which is minimised, and ``train_loss``, which is recorded.
        """
        found = distilled_loss(self.model, teacher, batch, weight, temperature, **hidden)
        self.log("train/loss", found.text, prog_bar=True)
        self.log_dict({"train/divergence": found.divergence, "train/mixture": found.mixture})
        if found.hidden is not None:
            self.log("train/hidden", found.hidden)
        return {"loss": found.mixture, "train_loss": found.text.detach()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accumulate the token-weighted loss."""
        nll, tokens = batch_nll(self.model, batch)
        self.val_nll.update(nll, tokens)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` (nats per token, over all ranks) and ``val/ppl``."""
        loss = self.val_nll.compute()
        self.val_nll.reset()
        # the same on all ranks already; sync_dist only tells Lightning so
        self.log("val/loss", loss.float(), prog_bar=True, sync_dist=True)
        self.log("val/ppl", perplexity(loss.item()), prog_bar=True, sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Derive this micro-batch's randomness, so that it does not depend on what ran before."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.started
        torch.manual_seed(step_seed(run_seed(), done, self.global_rank))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """AdamW with decoupled decay groups, and a schedule over the Trainer's whole run."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decayed if clean_name(name) in self._decayed else plain).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        # Lightning refuses to clip for an optimizer that could unscale gradients itself, as fused AdamW can: with a
        # grad scaler, and under autocast without sharding even where nothing is scaled.
        fused = self.trainer.precision != "16-mixed" and not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=fused)
        scheduler = self.scheduler(optimizer, whole_steps(self.trainer, self.lr_schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """``lr_schedule`` over so many optimizer steps."""
        return get_scheduler(self.lr_schedule, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=steps)

    def inputs(self) -> list[Any]:
        """Folders, files and hub names that this module reads, and which no result may replace; None is passed over."""
        return []

    def leaves(self, command: str) -> Path | None:
        """The folder that a command leaves its result in; None where this module writes none (``HFExport`` may)."""
        return None

    def write_export(
        self, folder: Path, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, card: str
    ) -> None:
        """Write the trained model as a Hugging Face folder, on one rank.

        Args:
            folder: Where to write; it takes its final name once it is complete.
            state: Weights of ``self.model``, whole; only the trained ones where ``trained_only``.
            tokenizer: Saved beside the weights.
            card: README.md of the folder.
        """
        export(folder, state, self.model.config, tokenizer, card, self.model.generation_config)

    def meta_model(self) -> nn.Module:
        """The same architecture on the meta device: costs no memory; for counting FLOPs and for export."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.model.config)
