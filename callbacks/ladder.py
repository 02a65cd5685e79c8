"""What several ways of making a model cheaper give together, and what each of them contributes."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from callbacks.inference_timing import decoding
from callbacks.measurement import Measurement, computed_in
from callbacks.prefill_timing import given, read, validation_text
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from common.progress import stage
from common.tables import Table, percent
from lightning_modules.loading import check_vocabulary, load, load_config
from lightning_modules.quantization import Format, check_available, quantize, weight_bytes
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality import measure
from lightning_modules.token_pruning.quality.answers import answer, is_right
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.planted import plant
from lightning_modules.token_pruning.quality.tasks import Window, plain_ids, suffix_windows
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer

DENSE, TOKENS = "dense", "tokens"
_NOISE = 1.1  # a speed-up above its bound by more than this is an error of measurement
_WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Rung:
    """One way of running the model, in which all that came before is contained.

    Attributes:
        name: What it adds.
        folder: Where the model is.
        weights: Fewer bits for its weights, if any.
        pruner: How its prompts are pruned, if they are.
    """

    name: str
    folder: str
    weights: Format | None = None
    pruner: PromptPruner | None = None

    def pruning(self, model: Any) -> AbstractContextManager[Any]:
        """The context in which the model reads and decodes."""
        return nullcontext() if self.pruner is None else self.pruner.prefill(model)


class Ladder(Measurement):
    """Adds up ways of making a model cheaper in ``validate``: dense, each of ``models``, fewer bits, fewer tokens.

    Every rung has the one before it inside, so the difference between the two is what it contributes. All rungs answer
    the same samples and take turns where they are timed. Loss is that of the end of a text after its beginning was
    read, which pruned prompts change, too. Each model is loaded once, and all are in memory at once.

    Args:
        dense: Hugging Face folder, GGUF file or hub name of the model that all began with; by default the module's
            ``pretrained`` or ``base``.
        models: Further models by the name of what was done to the one before: ``{structure: FOLDER, tiers: FOLDER}``;
            pruned and packed folders as they are.
        weights: Fewer bits for the weights of the last of them, by torchao; None leaves that rung out.
        scorer: Which tokens of its prompts to keep; without scorer and pruner that rung is left out.
        schedule: After which layers and how many; the default schedule when not given.
        pruner: What `calibrate` found for the last model, in place of both: its folder.
        windows: Texts whose end is predicted.
        suffix: Tokens of that end.
        facts: Planted facts that are asked for besides; needs a model that answers questions.
        lengths: Most tokens of a prompt with a fact, in turn.
        max_new_tokens: Longest answer, in tokens.
        prompt_tokens: Tokens of the prompt that is timed.
        new_tokens: Decoding steps of one timed call.
        repeats: Timed rounds; 0 times nothing.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.
    """

    during_validate = True

    def __init__(
        self,
        dense: str | None = None,
        models: dict[str, str] = {},  # noqa: B006 (jsonargparse shows it)
        weights: Format | None = None,
        scorer: Scorer | None = None,
        schedule: Schedule | None = None,
        pruner: str | None = None,
        windows: int = 64,
        suffix: int = 64,
        facts: int = 0,
        lengths: list[int] = [600, 1200],  # noqa: B006
        max_new_tokens: int = 24,
        prompt_tokens: int = 1024,
        new_tokens: int = 16,
        repeats: int = 5,
        attention: str | None = None,
    ) -> None:
        for name, value in {"windows": windows, "suffix": suffix, "new_tokens": new_tokens}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min(facts, repeats) < 0 or prompt_tokens < 2:
            raise ValueError(f"facts, repeats ≥ 0, prompt_tokens ≥ 2, got {facts}, {repeats} and {prompt_tokens}")
        taken = {DENSE, TOKENS, weights} & set(models)
        if taken:
            raise ValueError(f"models: {', '.join(map(str, taken))} names another rung; call it differently")
        if not (models or weights or scorer or pruner):
            raise ValueError("nothing to add up: give models, weights, or a scorer")
        self.dense, self.models, self.weights = dense, models, weights
        chosen, schedule, base = given(scorer, schedule, pruner)
        self.pruner = PromptPruner(chosen, schedule, base=base) if chosen is not None else None
        self.windows, self.suffix, self.facts, self.lengths = windows, suffix, facts, lengths
        self.max_new_tokens, self.prompt_tokens, self.new_tokens = max_new_tokens, prompt_tokens, new_tokens
        self.repeats, self.attention = repeats, attention
        self.rungs: list[Rung] = []
        self.rows: list[dict[str, Any]] = []

    def check_arguments(self, command: str, model: Any, data: Any) -> None:
        """Refuse before any text or weight is read.

        Raises:
            FileNotFoundError: See ``loading.load``.
            ValueError: torchao is not installed, a model that cannot be pruned or reads no prompts of such a length, or
                no folder of the dense model.
        """
        if command != "validate":
            return
        if self.weights is not None:
            check_available()
        self.rungs = list(self._made(model))
        for rung in self.rungs:
            config = load_config(rung.folder)
            if rung.pruner is not None:
                rung.pruner.check(config)
            room = getattr(config, "max_position_embeddings", None)
            longest = max(self.prompt_tokens + self.new_tokens, *(self.lengths if self.facts else [0]))
            if room is not None and longest > room:
                raise ValueError(f"{rung.folder} reads {room} tokens, not {longest}: shorten prompt_tokens or lengths")

    def _made(self, pl_module: Any) -> Iterator[Rung]:
        dense = self.dense or getattr(pl_module, "pretrained", None) or getattr(pl_module, "base", None)
        if dense is None:
            raise ValueError(f"Ladder.dense: give its folder; {type(pl_module).__name__} has none")
        folder = str(dense)
        yield Rung(DENSE, folder)
        for name, folder in self.models.items():
            yield Rung(name, folder)
        if self.weights is not None:
            yield Rung(self.weights, folder, self.weights)
        if self.pruner is not None:
            yield Rung(TOKENS, folder, self.weights, self.pruner)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, only in ``validate``.

        Raises:
            ValueError: More than one process, or text too short.
        """
        if trainer.state.fn != "validate":
            return
        if trainer.world_size > 1:
            raise ValueError(f"Ladder measures one process, not {trainer.world_size}: set trainer.devices to 1")
        self.rungs = self.rungs or list(self._made(pl_module))
        data: Any = trainer.datamodule
        models = self._loaded(trainer)
        check_vocabulary(models[DENSE], data.tokenizer)
        windows, asked = self._windows(data), self._asked(data)
        whole: measure.Arm | None = None
        for rung in self.rungs:
            model, arm = models[rung.name], self._losses(rung, models[rung.name], windows)
            whole = whole or arm
            found = measure.summarise("suffix", rung.name, None, arm, whole)
            row: dict[str, Any] = {"rung": rung.name, "model": rung.folder, "weights": rung.weights}
            row |= {name: found[name] for name in ("samples", "nll", "nll_rise", "nll_rise_low", "nll_rise_high")}
            row |= self._answers(rung, model, data.tokenizer, asked) | _sizes(rung, model)
            self.rows.append(row)
            rank_zero_info(f"{rung.name}: loss {row['nll']:.4f} nats ({row['nll_rise']:+.4f})")
        self._time(models, validation_text(trainer, self.prompt_tokens))
        Console().print(*tables(self.rows))

    def _loaded(self, trainer: Trainer) -> dict[str, Any]:
        """Every rung's model by the rung's name; a rung that only reads differently has the same one as before."""
        once: dict[tuple[str, Format | None], Any] = {}
        for rung in self.rungs:
            if (rung.folder, rung.weights) not in once:
                once[rung.folder, rung.weights] = self._load(rung, trainer)
        return {rung.name: once[rung.folder, rung.weights] for rung in self.rungs}

    def _load(self, rung: Rung, trainer: Trainer) -> Any:
        dtype = computed_in(trainer.precision)
        model: Any = load(rung.folder, dtype, self.attention).to(trainer.strategy.root_device)
        if rung.weights is not None:
            quantize(model, rung.weights)
        return model

    # ---- quality --------------------------------------------------------------------------------------------------

    def _windows(self, data: Any) -> list[Window]:
        """The texts that all rungs read."""
        found: list[Window] = []
        left = self.windows
        for batch in data.val_dataloader():
            found.append(suffix_windows(plain_ids(batch, "Ladder")[:left], self.suffix))
            left -= len(found[-1].prompt)
            if left <= 0:
                break
        if not found:
            raise ValueError(f"no validation text in {data.name}")
        return found

    def _losses(self, rung: Rung, model: Any, windows: list[Window]) -> measure.Arm:
        arm = measure.Arm()
        with stage(f"Texts with {rung.name}", self.windows, "texts") as show:
            for window in windows:
                measure.read(model, Window(*(part.to(model.device) for part in window)), rung.pruner, arm)
                show(len(arm.nll))
        return arm

    def _asked(self, data: Any) -> list[Asked]:
        """The prompts that all rungs answer."""
        if not self.facts:
            return []
        texts = [text for split, text in data.documents() if split == "val"]
        return plant(texts, data.tokenizer, self.lengths, self.facts, split="test")

    def _answers(self, rung: Rung, model: Any, tokenizer: Any, asked: list[Asked]) -> dict[str, Any]:
        if not asked:
            return {}
        right = 0
        with stage(f"Facts with {rung.name}", len(asked), "answers") as show:
            for number, one in enumerate(asked, 1):
                right += is_right(one, answer(model, tokenizer, one, rung.pruner, self.max_new_tokens))
                show(number)
        share, low, high = measure.proportion(right, len(asked))
        return {"asked": len(asked), "right": share, "right_low": low, "right_high": high}

    # ---- time and bytes -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _time(self, models: dict[str, Any], ids: Tensor) -> None:
        if not self.repeats:
            return
        if len(ids) < self.prompt_tokens:
            raise ValueError(f"prompt_tokens: the validation text has only {len(ids)} tokens")
        prompt, prefills, decodes = ids[None], {}, {}
        for rung, row in zip(self.rungs, self.rows, strict=True):
            model = models[rung.name]
            here = prompt.to(model.device)
            prefills[rung.name] = _prefill(rung, model, here)
            row["kv_bytes"], decodes[rung.name] = self._decode(rung, model, here)
            row |= self._work(rung, model, row)
        for phase, arms, per in (("prefill", prefills, 1), ("decode", decodes, self.new_tokens)):
            with stage(f"Timing {phase} in turns", (self.repeats + 1) * len(arms), "calls") as show:
                times = interleaved(_counted(arms, show), self.repeats)
            before, first = times[DENSE], self.rows[0]
            for row in self.rows:
                mine = times[row["rung"]]
                spent, up, gain = (
                    percentiles([ms / per for ms in mine]),
                    *(ratio_with_spread(base, mine) for base in (times[DENSE], before)),
                )
                bound = max(first[f"{phase}_{what}"] / row[f"{phase}_{what}"] for what in ("flops", "bytes"))
                row |= {f"{phase}_ms": spent["p50"], f"{phase}_ms_iqr": spent["iqr"]}
                row |= {f"{phase}_speedup": up["ratio"], f"{phase}_speedup_spread": up["spread"]}
                row |= {f"{phase}_gain": gain["ratio"], f"{phase}_bound": bound}
                before = mine

    def _decode(self, rung: Rung, model: Any, prompt: Tensor) -> tuple[int, Callable[[], None]]:
        """Bytes of the prompt's cache, and a call that decodes after it."""
        with rung.pruning(model):
            cache = DynamicCache(config=model.config)
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            held: list[Any] = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            size = sum(part.nbytes for part in held)
            once = decoding(model, prompt, self.new_tokens)

        def call() -> None:
            with rung.pruning(model):
                once()

        return size, call

    def _work(self, rung: Rung, model: Any, row: dict[str, Any]) -> dict[str, float]:
        """What must be computed and read at least, for reading the prompt and for one token after it.

        Zeros count as other weights do: nothing here multiplies without them.
        """
        cost, layers, length = Cost.of(model), model.config.num_hidden_layers, self.prompt_tokens
        lengths = rung.pruner.schedule.lengths(length, layers) if rung.pruner else [length] * layers
        attention = sum(flops * n for flops, n in zip(cost.attention, lengths, strict=True))
        weights = row["weight_bytes"] - row["embedding_bytes"]
        return {
            "prefill_flops": cost.prefill(lengths),
            "prefill_bytes": weights,
            "decode_flops": sum(cost.linear) + cost.head + attention,
            "decode_bytes": weights + row["kv_bytes"],
        }

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``: the block ``ladder``."""
        if not self.rows:
            return {}
        asked = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "suffix": self.suffix}
        found = [doubt for row in self.rows for phase in ("prefill", "decode") for doubt in _doubts(row, phase)]
        return {"ladder": {**asked, "rungs": self.rows}, **({"suspicious": found} if found else {})}


def _doubts(row: dict[str, Any], phase: str) -> list[str]:
    """A speed-up above its bound, in words."""
    speedup, bound = row.get(f"{phase}_speedup"), row.get(f"{phase}_bound")
    if speedup is None or bound is None or speedup <= _NOISE * bound:
        return []
    return [f"{row['rung']}: {phase} {speedup:.2f} × is above its bound of {bound:.2f} ×"]


def _prefill(rung: Rung, model: Any, prompt: Tensor) -> Callable[[], object]:
    def call() -> object:
        with rung.pruning(model):
            return read(model, prompt)

    return call


def _counted(arms: dict[str, Callable[[], Any]], show: Callable[[int], None]) -> dict[str, Callable[[], None]]:
    """The same calls, each of which says how many there were."""
    calls = itertools.count(1)

    def counted(arm: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            arm()
            show(next(calls))

        return call

    return {name: counted(arm) for name, arm in arms.items()}


def _sizes(rung: Rung, model: Any) -> dict[str, Any]:
    """Parameters, bytes of the weights while the model runs and in its files."""
    folder = Path(rung.folder).expanduser()
    files = [folder] if folder.is_file() else [file for kind in _WEIGHTS for file in folder.glob(kind)]
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    weights = model.parameters()
    return {
        "parameters": sum(int(weight.numel()) for weight in weights),
        "weight_bytes": weight_bytes(model),
        # looked up, not read as a whole, where it is not the head as well
        "embedding_bytes": 0 if tied else embedding.nbytes,
        "file_bytes": sum(file.stat().st_size for file in files) or None,  # a name on the Hub has none here
    }


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Every rung beside the dense model: what it costs, how fast it is beside its bounds, and its bytes."""
    costs: list[list[Any]] = [[row["rung"], row["nll"], f"{row['nll_rise']:+.4f}"] for row in rows]
    headers = ["rung", "loss", "over dense"]
    if "right" in rows[0]:
        headers.append("facts right")
        costs = [[*cost, percent(row["right"])] for cost, row in zip(costs, rows, strict=True)]
    made = [Table(headers, costs, "each rung adds to those above it")]
    if "prefill_ms" in rows[0]:
        ways = [(phase, what) for phase in ("prefill", "decode") for what in ("speedup", "gain", "bound")]
        speeds = [[row["rung"], *(f"{row[f'{phase}_{what}']:.2f} ×" for phase, what in ways)] for row in rows]
        names = ["rung", "prefill", "its part", "bound", "decode", "its part", "bound"]
        made.append(Table(names, speeds, "times as fast as dense"))
    parts = ("weight", "kv", "file")
    sizes = [[row["rung"], *(_megabytes(row.get(f"{part}_bytes")) for part in parts)] for row in rows]
    return [*made, Table(["rung", "weights", "cache", "files"], sizes, "bytes")]


def _megabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e6:,.1f} MB"
