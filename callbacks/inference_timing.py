"""What pruning buys at inference: latency of prefill and decode beside the dense model's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.measurement import Measurement, computed_in
from common import progress
from common.measure.inference import compare_models, decode_work, prefill_work
from lightning_modules.loading import load, load_config
from lightning_modules.structured_pruning.model_shape import ModelShape


class InferenceTiming(Measurement):
    """Times the dense and the pruned model in turns after ``validate``, at several batch sizes.

    Both run in the run's device and dtype on the same prompts, which are drawn at random: latency does not depend on
    what they say. Memory is counted (weights and cached keys and values) and, on a GPU, also measured.

    Args:
        dense: Hugging Face folder, GGUF file or hub name of the dense model; by default the module's ``base``.
        pruned: The same of the pruned model, by default the module's ``output``; merge adapters first, they cost time
            of their own.
        prompt_tokens: Tokens of every prompt.
        new_tokens: Decoding steps of one timed call.
        batch_sizes: Prompts computed together.
        repeats: Timed rounds.
        attention: Attention kernel of both, as transformers names it; None takes transformers' choice.
    """

    during_validate = True

    def __init__(
        self,
        dense: str | None = None,
        pruned: str | None = None,
        prompt_tokens: int = 512,
        new_tokens: int = 16,
        batch_sizes: list[int] = [1, 8, 64],  # noqa: B006 (jsonargparse shows it)
        repeats: int = 5,
        attention: str | None = None,
    ) -> None:
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
        for name, value in {**sizes, "batch_sizes": min(batch_sizes, default=0)}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.attention = attention
        self.dense = dense
        self.pruned = pruned
        self.folders: dict[str, str] = {}
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.batch_sizes = batch_sizes
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before the validation whether both models are there and take prompts of this length.

        Raises:
            FileNotFoundError: See ``loading.load``.
            ValueError: See ``loading.load``; a model has fewer positions than prompt and new tokens; or a folder is not
                given and the module has none.
        """
        if stage != "validate":
            return
        given = {"dense": self.dense, "pruned": self.pruned}
        self.folders = given_models(given, pl_module, type(self).__name__, self.prompt_tokens + self.new_tokens)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, on rank 0 and only in ``validate``."""
        if trainer.state.fn != "validate" or not trainer.is_global_zero:
            return
        dtype = computed_in(trainer.precision)
        device = trainer.strategy.root_device
        models: dict[str, Any] = {
            name: load(folder, dtype, self.attention).to(device) for name, folder in self.folders.items()
        }
        self.rows = []
        turns = [(batch, phase) for batch in self.batch_sizes for phase in ("prefill", "decode")]
        with progress.stage("Inference timing", len(turns), "measurements") as done:
            for batch, phase in turns:
                row = self.measure(models, phase, batch)
                self.rows.append({"phase": phase, "batch": batch, **row})
                done(len(self.rows))
                rank_zero_info(
                    f"{phase}, batch {batch}: {row['speedup']:.2f} × as fast (bounds: FLOPs {row['flop_bound']:.2f}, "
                    f"bytes {row['byte_bound']:.2f})"
                )

    @torch.no_grad()
    def measure(self, models: dict[str, Any], phase: str, batch: int) -> dict[str, Any]:
        """Time "dense" and "pruned" in turns: a row of the record's block ``inference``.

        Args:
            models: Both, on one device.
            phase: "prefill" or "decode".
            batch: Prompts at once.
        """
        vocabulary = min(model.config.vocab_size for model in models.values())
        device = next(iter(models.values())).device
        ids = torch.randint(vocabulary, (batch, self.prompt_tokens), generator=torch.Generator().manual_seed(0))
        arms = {name: _arm(model, ids.to(device), phase, self.new_tokens) for name, model in models.items()}
        works, memory = [], {}
        for name, model in models.items():
            item = model.dtype.itemsize
            whole = ModelShape.of(model, item)
            cost = whole.footprint(self.prompt_tokens)
            read = (cost.decoder_parameters + whole.head_parameters) * item
            head = 2 * whole.head_parameters
            if phase == "prefill":
                works.append(prefill_work(cost.flops_per_token - head, head, read, batch, self.prompt_tokens))
            else:
                context = self.prompt_tokens + self.new_tokens // 2
                weights = 2 * read / item
                works.append(decode_work(weights, read, cost.kv_bytes_per_token, batch, context))
            memory[f"{name}_weight_bytes"] = cost.weight_bytes
            memory[f"{name}_kv_bytes"] = batch * (self.prompt_tokens + self.new_tokens) * cost.kv_bytes_per_token
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                arms[name]()
                memory[f"{name}_peak_bytes_above_weights"] = torch.cuda.max_memory_allocated(device) - before
        steps = self.new_tokens if phase == "decode" else 1
        timed = compare_models(arms["dense"], arms["pruned"], (works[0], works[1]), self.repeats, steps)
        return timed | memory

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        if not self.rows:
            return {}
        return {"inference": {**self.folders, "prompt_tokens": self.prompt_tokens, "rows": self.rows}}


def given_models(
    given: Mapping[str, str | None], pl_module: LightningModule, owner: str, tokens: int
) -> dict[str, str]:
    """Folders of the dense and the pruned model: those given, or else the module's ``base`` and ``output``.

    Args:
        given: What a callback was told, by "dense" and "pruned".
        pl_module: The module.
        owner: The callback's name, for errors.
        tokens: What both must be able to read.

    Raises:
        FileNotFoundError: See ``loading.load``.
        ValueError: See ``loading.load``; a model has fewer positions; or a folder is not given and the module has none.
    """
    folders = {}
    for name, attribute in (("dense", "base"), ("pruned", "output")):
        folder = given[name] or getattr(pl_module, attribute, None)
        if folder is None:
            raise ValueError(f"{owner}.{name}: give its folder; {type(pl_module).__name__} has none")
        folders[name] = str(folder)
    for name, folder in folders.items():
        most = getattr(load_config(folder), "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise ValueError(
                f"{owner}.prompt_tokens and new_tokens are {tokens} together, more than the {most} positions of the "
                f"{name} model, {folder}"
            )
    return folders


def _arm(model: Any, ids: torch.Tensor, phase: str, new_tokens: int) -> Callable[[], None]:
    """A call that reads the prompts, or that decodes after them and then forgets what it decoded."""
    if phase == "decode":
        return decoding(model, ids, new_tokens)

    def prefill() -> None:
        _read(model, ids)

    return prefill


def _read(model: Any, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def decoding(model: Any, ids: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """Read some prompts; a call then decodes so many tokens after them, and forgets them.

    Args:
        model: A causal language model.
        ids: Prompts ``[B, T]``, on its device.
        new_tokens: Tokens of a call.
    """
    cache = _read(model, ids)
    cache.activate_past_recording()  # else layers with a full sliding window could forget nothing

    def decode() -> None:
        token = ids[:, -1:]
        with torch.no_grad():
            for _ in range(new_tokens):
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
            cache.crop(-new_tokens)

    return decode
