"""What fewer bits cost and save after pruning: perplexity, size and decoding of dense and pruned models."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from callbacks.inference_timing import decoding, given_models
from callbacks.measurement import Measurement, computed_in
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from common.progress import stage
from common.tables import Table
from lightning_modules.loading import load
from lightning_modules.perplexity import validation_perplexity
from lightning_modules.quantization import Format, check_available, quantize, weight_bytes


class QuantizationTiming(Measurement):
    """Compares the dense and the pruned model after ``validate``, each as it is and in fewer bits by torchao.

    All forms decode in turns, so that a slow minute of the machine hits all of them. Bytes are those that weights take,
    with scales and zeros; embeddings and head are not quantised.

    Args:
        formats: Weights of the decoder's linear layers.
        dense: Hugging Face folder, GGUF file or hub name of the dense model; by default the module's ``base``.
        pruned: The same of the pruned model, by default the module's ``output``.
        prompt_tokens: Tokens of the prompt that decoding goes on from.
        new_tokens: Decoding steps of one timed call.
        batch_size: Prompts computed together.
        repeats: Timed rounds; 0 times nothing.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.
    """

    during_validate = True

    def __init__(
        self,
        formats: list[Format] = ["int8", "int4"],  # noqa: B006 (jsonargparse shows it)
        dense: str | None = None,
        pruned: str | None = None,
        prompt_tokens: int = 128,
        new_tokens: int = 8,
        batch_size: int = 1,
        repeats: int = 5,
        attention: str | None = None,
    ) -> None:
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if repeats < 0:
            raise ValueError(f"repeats must not be negative, got {repeats}")
        self.formats, self.given, self.attention = formats, {"dense": dense, "pruned": pruned}, attention
        self.prompt_tokens, self.new_tokens, self.batch_size = prompt_tokens, new_tokens, batch_size
        self.repeats = repeats
        self.folders: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def check_arguments(self, command: str, model: Any, data: Any) -> None:
        """Refuse where torchao is not installed.

        Raises:
            ValueError: It is not.
        """
        if command == "validate":
            check_available()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before the validation whether both models are there.

        Raises:
            FileNotFoundError: See ``loading.load``.
            ValueError: See ``InferenceTiming.setup``; or more than one process.
        """
        if stage != "validate":
            return
        if trainer.world_size > 1:
            raise ValueError(f"QuantizationTiming measures one process, not {trainer.world_size}")
        self.folders = given_models(self.given, pl_module, type(self).__name__, self.prompt_tokens + self.new_tokens)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, only in ``validate``."""
        if trainer.state.fn != "validate":
            return
        data: Any = trainer.datamodule
        dtype = computed_in(trainer.precision)
        self.rows, arms = [], {}
        for name, folder in self.folders.items():
            for form in (None, *self.formats):
                model: Any = load(folder, dtype, self.attention).to(trainer.strategy.root_device)
                if form is not None:
                    quantize(model, form)
                title = f"{name} {form or dtype_name(dtype)}"
                ppl = validation_perplexity(model, data, f"Perplexity of {title}")
                row = {"model": name, "weights": form or dtype_name(dtype), "ppl": ppl}
                self.rows.append(row | {"weight_bytes": weight_bytes(model)})
                rank_zero_info(f"{title}: perplexity {ppl:.3f}, {self.rows[-1]['weight_bytes'] / 1e6:.1f} MB")
                arms[title] = self._decoding(model)
        self._time(arms)
        Console().print(table(self.rows))

    @torch.no_grad()
    def _decoding(self, model: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (self.batch_size, self.prompt_tokens), generator=generator)
        return decoding(model, ids.to(model.device), self.new_tokens)

    def _time(self, arms: dict[str, Any]) -> None:
        if not self.repeats:
            return
        with stage("Decoding in turns", (self.repeats + 1) * len(arms), "calls") as done:
            calls = itertools.count(1)

            def counted(arm: Callable[[], None]) -> Callable[[], None]:
                def call() -> None:
                    arm()
                    done(next(calls))

                return call

            times = interleaved({name: counted(arm) for name, arm in arms.items()}, self.repeats)
        first = next(iter(times.values()))
        for row, samples in zip(self.rows, times.values(), strict=True):
            summary = percentiles([ms / self.new_tokens for ms in samples])
            found = ratio_with_spread(first, samples)
            row |= {"decode_ms": summary["p50"], "decode_ms_iqr": summary["iqr"]}
            row |= {"speedup": found["ratio"], "speedup_spread": found["spread"]}

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        if not self.rows:
            return {}
        return {"quantization": self.rows, "quantization_models": self.folders}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations name it."""
    return str(dtype).removeprefix("torch.")


def table(rows: list[dict[str, Any]]) -> Table:
    """Perplexity, size and decoding of every form."""
    lines = [
        [row["model"], row["weights"], row["ppl"], row["weight_bytes"] / 1e6, row.get("decode_ms"), row.get("speedup")]
        for row in rows
    ]
    headers = ["model", "weights", "perplexity", "MB", "ms a token", "speed-up over the first"]
    return Table(headers, lines, "weights in fewer bits")
