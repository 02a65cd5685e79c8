"""Calibration as a command: ``python main.py calibrate``."""

from math import floor, log10
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console

from common.files import check_output, inputs_of, replacing
from common.progress import stage
from common.tables import Table
from lightning_modules.card import card, code, short, table, write_card
from lightning_modules.causal_lm import check_vocabulary
from lightning_modules.data.cache import cache_root
from lightning_modules.loading import Dtype, load, load_config
from lightning_modules.token_pruning.anatomy import check_supported
from lightning_modules.token_pruning.calibration.measured import Measured, store
from lightning_modules.token_pruning.calibration.search import (
    Reading,
    Stages,
    best_readings,
    framed,
    merit,
    only,
    schedules,
)
from lightning_modules.token_pruning.calibration.trial import try_out
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.pruning_file import FILE, content
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.asking import Answers
from lightning_modules.token_pruning.quality.planted import plant
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Scorer
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from lightning_modules.token_pruning.scorers.random import Random

_FEWEST = 8  # right answers to measure on
_TRIED = 3  # schedules that are tried out
_ANSWER = 24  # tokens of an answer
_CHARACTERS = 32  # of text for each token that is asked for: passages are spread over them


class TokenCalibration(L.LightningModule):
    """Finds the layers and heads of a model that look up what is asked for, and a schedule that reaches a speed-up.

    Facts are planted in the user's own text and asked for at its end. Where the unpruned model answers right, the
    attention of the prompt's end is read in every layer and head: how much of the context must stay, by that head's
    scores, for the whole answer to stay? The search takes the stages with most room at the asked speed-up, and the best
    few are tried out on further facts. The result is a folder for ``PromptPruner.from_file``.

    Args:
        base: Hugging Face folder, GGUF file or hub name of the model.
        output: Folder of the result.
        speedup: Bound of the speed-up by floating-point operations that the schedule reaches at every length.
        lengths: Prompt lengths in tokens, template and question included.
        facts: Planted facts to measure on; half as many again are for trying out.
        distractors: Facts of the same kind about others that are planted beside each.
        windows: Numbers of asking tokens to choose from.
        pools: Widths of the mean over neighbours to choose from, odd.
        sinks: Tokens at the start that always stay.
        tail: Share of the prompt at its end that always stays.
        min_tail: Least number of tokens at the end that stay.
        seed: Of what is planted where.
        overwrite: Replace a folder at ``output`` that Pare did not write.
        cache_dir: Folder for what was measured, from which a killed run goes on. Default: $PARE_CACHE, or
            ~/.cache/pare.
        dtype: What the model's weights are loaded as; "auto" is what they are on disk, "fast" the same but
            float32 on processors without instructions for 16 bits.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        base: str,
        output: str = "runs/calibrated",
        speedup: float = 2.0,
        lengths: list[int] = [600, 1200, 2400],  # noqa: B006 (jsonargparse shows it)
        facts: int = 64,
        distractors: int = 0,
        windows: list[int] = [8, 16, 32],  # noqa: B006
        pools: list[int] = [9, 17, 25],  # noqa: B006
        sinks: int = 4,
        tail: float = 0.0,
        min_tail: int = 32,
        seed: int = 0,
        overwrite: bool = False,
        cache_dir: str | None = None,
        dtype: Dtype = "fast",
        attention: str | None = None,
    ) -> None:
        super().__init__()
        if speedup <= 1:
            raise ValueError(f"speedup must be above 1, got {speedup}")
        if facts < _FEWEST:
            raise ValueError(f"facts must be at least {_FEWEST}, got {facts}")
        if not lengths or not windows or not pools or min(windows) < 1:
            raise ValueError(f"lengths, windows ≥ 1 and pools are needed, got {lengths}, {windows} and {pools}")
        if max(windows) > min_tail:
            raise ValueError(f"windows must not exceed min_tail, for asking tokens stay; got {windows} and {min_tail}")
        self.base, self.output, self.speedup = base, Path(output).expanduser(), speedup
        self.lengths, self.facts, self.windows = sorted(lengths), facts, sorted(windows)
        self.distractors = distractors
        self.frames = [Schedule(sinks=sinks, tail=tail, min_tail=min_tail, pool=pool) for pool in pools]
        self.seed, self.overwrite = seed, overwrite
        self.cache = cache_root(cache_dir).with_name("calibration")
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.base]

    def leaves(self, command: str) -> Path | None:
        """See ``CausalLM.leaves``."""
        return self.output if command == "calibrate" else None

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what `calibrate` cannot do, before any text or weight is read.

        Args:
            command: Others than "calibrate" are not looked at.
            data: The DataModule.

        Raises:
            FileNotFoundError: No such base.
            ValueError: A model that cannot be pruned, lengths that it has no positions for, a speed-up that no stage
                can reach, or see ``common.files.check_output``.
        """
        if command != "calibrate":
            return
        config = load_config(self.base)
        check_supported(config)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and max(self.lengths) + _ANSWER > longest:
            raise ValueError(
                f"model.lengths: {max(self.lengths)} tokens and {_ANSWER} of the answer, but {self.base} has {longest} "
                "positions"
            )
        if self.speedup >= config.num_hidden_layers:
            raise ValueError(
                f"model.speedup: {self.speedup} cannot be reached: pruning after the first of "
                f"{config.num_hidden_layers} layers saves less than {config.num_hidden_layers}-fold"
            )
        if not hasattr(data, "documents"):
            raise ValueError(
                f"data: {type(data).__name__} has no plain texts to plant facts in, as TextCorpus and EmbeddedDocs have"
            )
        check_output(self.output, "model.output", inputs_of(self, data), self.overwrite)

    # ---- the command ---------------------------------------------------------------------------------------------

    def calibrate(self, datamodule: Any, device: torch.device) -> dict[str, Any]:
        """Measure, choose, try out, write; returns the record's ``calibration``."""
        model: Any = load(self.base, **self.loading).to(device)
        tokenizer = datamodule.tokenizer
        check_vocabulary(model, tokenizer)
        asked = self._asked(datamodule)
        measured, tried = asked[: self.facts], asked[self.facts :]
        folder = store(self.cache, model, tokenizer, self.windows, asked)
        answers = Answers(folder / "answers.jsonl", model, _ANSWER)
        facts = Measured(folder, self.windows)
        facts.read(model, tokenizer, measured, answers)
        self._check_known(len(facts.files), len(measured))
        cost, lengths = Cost.of(model), [min(len(one.ids) for one in asked), *self.lengths]

        def bound(schedule: Schedule, scorer: Scorer) -> list[float]:
            return [cost.bound(n, schedule, scorer) for n in lengths]

        tables: dict[Any, list[Reading]] = {}
        found: list[Stages] = []
        with stage("Searching schedules", len(self.windows) * len(self.frames), "windows and pools") as show:
            for number, window in enumerate(self.windows):
                for frame in self.frames:
                    readings = tables[window, frame.pool] = facts.readings(number, frame)
                    found += schedules(best_readings(readings), cost, lengths, self.speedup, frame, window)[:_TRIED]
                    show(len(tables))
        distinct = self._distinct(found)
        pairs: list[tuple[Schedule, Scorer]] = [self._made(stages) for stages in distinct]
        pairs.append((pairs[0][0], Random(self.seed)))
        rows = try_out(model, tokenizer, pairs, tried, answers, lambda *pair: min(bound(*pair)))
        chosen = self._best(distinct, rows)
        schedule, scorer = self._made(chosen)
        summary = {
            "model": self.base,
            "speedup": self.speedup,
            "lengths": lengths,
            "bound": bound(schedule, scorer),
            "right": len(facts.files),
            "asked": len(measured),
            "layers": schedule.layers,
            "keep": schedule.keep,
            "window": chosen.window,
            "pool": chosen.pool,
            "heads": only(chosen),
            "room": chosen.room,
            "needed": _by_layer(tables[chosen.window, chosen.pool]),
            "tried": rows,
        }
        with replacing(self.output, "pruning", inputs_of(self, datamodule), self.overwrite) as folder:
            text = content(schedule, scorer, identity_of(model), summary)
            (folder / FILE).write_text(text, encoding="utf-8")
            write_card(folder, _card(summary))
        self._show(summary)
        return {"calibration": summary}

    def _asked(self, data: Any) -> list[Asked]:
        """Facts to measure on, then facts to try out; half of each with the answer begun."""
        count = self.facts + self.facts // 2
        stream = _beginning(data, _CHARACTERS * count * max(self.lengths))
        half = len(stream) // 2
        free, begun = (
            plant([part], data.tokenizer, self.lengths, size, prefix, self.seed, distractors=self.distractors)
            for part, size, prefix in ((stream[:half], (count + 1) // 2, False), (stream[half:], count // 2, True))
        )
        return [one for pair in zip(free, begun, strict=False) for one in pair] + free[len(begun) :]

    def _check_known(self, right: int, asked: int) -> None:
        """Says how many facts the unpruned model knows.

        Raises:
            ValueError: It hardly answers any.
        """
        print(f"{self.base} answers {right} of {asked} planted facts without pruning", flush=True)
        if right < _FEWEST:
            raise ValueError(
                f"{self.base} answers {right} of {asked} planted facts without pruning, too few to see what "
                f"pruning loses (at least {_FEWEST}): shorten model.lengths, plant more model.facts, or take a model "
                "that answers questions about a text"
            )

    # ---- choosing -------------------------------------------------------------------------------------------------

    def _distinct(self, found: list[Stages]) -> list[Stages]:
        """The best schedules, no two with the same layers.

        Raises:
            ValueError: None reaches the speed-up.
        """
        if not found:
            raise ValueError(f"model.speedup: no schedule reaches {self.speedup}; ask for less")
        distinct: dict[tuple[int, ...], Stages] = {}
        for one in sorted(found, key=merit):
            distinct.setdefault(tuple(reading.layer for reading in one.readings), one)
        return list(distinct.values())[:_TRIED]

    def _made(self, stages: Stages) -> tuple[Schedule, LastWindow]:
        frame = next(frame for frame in self.frames if frame.pool == stages.pool)
        layers = [reading.layer - 1 for reading in stages.readings]
        schedule = framed(frame, layers, [_rounded_down(share) for share in stages.keep])
        return schedule, LastWindow(stages.window, "max", only(stages))

    def _best(self, found: list[Stages], rows: list[dict[str, Any]]) -> Stages:
        """The schedule that keeps most answers; the first of equals.

        Raises:
            ValueError: The unpruned model answers too few of them.
        """
        right = rows[0]["unpruned"]
        if right < _FEWEST // 2:
            raise ValueError(
                f"{self.base} answers {right} of {self.facts // 2} further facts without pruning, too few to choose "
                "by; plant more model.facts"
            )
        return found[max(range(len(found)), key=lambda number: (rows[number]["right"], -number))]

    def _show(self, summary: dict[str, Any]) -> None:
        rows = [
            [
                row["scorer"],
                str(row["layers"]),
                str(row["keep"]),
                f"{row['bound']:.2f}×",
                f"{row['right']} of {row['unpruned']}",
                f"{row['kept_low']:.0%} to {row['kept_high']:.0%}",
            ]
            for row in summary["tried"]
        ]
        headers = ["scorer", "after layers", "keep", "bound", "right answers kept", "95 % interval"]
        Console().print(Table(headers, rows))
        if summary["room"] < 1:
            print(
                f"these stages keep {summary['room']:.2f} of what 95 % of the answers needed: expect to lose some, or "
                f"ask for less than model.speedup {summary['speedup']:g}"
            )
        print(
            f"chosen: after layers {summary['layers']} keep {summary['keep']}, window {summary['window']}, pool "
            f"{summary['pool']}, heads {summary['heads'] or 'all'}\n{self.output / FILE}: "
            f"PromptPruner.from_file({str(self.output)!r}), or --pruner {self.output}"
        )


def _card(summary: dict[str, Any]) -> str:
    """The folder's model card.

    Args:
        summary: The record's ``calibration``.
    """
    base, rows = short(summary["model"]), summary["tried"]
    chosen = next(row for row in rows if row["layers"] == summary["layers"])
    facts = {
        "after layers": summary["layers"],
        "share of the prompt that stays": summary["keep"],
        "speed-up, bound by arithmetic, at its least": f"{min(summary['bound']):.2f}×",
        "right answers kept, of facts not measured on": f"{chosen['right']} of {chosen['unpruned']}",
        "95 % interval": f"{chosen['kept_low']:.0%} to {chosen['kept_high']:.0%}",
    }
    load = code(
        "from lightning_modules.token_pruning.prefill import PromptPruner",
        'pruner = PromptPruner.from_file("{here}")',
        "with pruner.prefill(model):",
        "    model.generate(...)",
    )
    text = f"Drops tokens of long prompts while {base} reads them, layer by layer.\n\n{load}\n{table(facts)}"
    return card(f"Token pruning for {base}", text, summary["model"], ["token-pruning"], "pare")


def _rounded_down(share: float) -> float:
    """To four decimals; a share below them to one digit."""
    digits = max(4, -floor(log10(share)))
    return floor(share * 10**digits) / 10**digits


def _beginning(data: Any, characters: int) -> str:
    """The first texts of the training split, so many characters or all."""
    texts, have = [], 0
    for split, text in data.documents():
        if split == "train":
            texts.append(text)
            have += len(text)
        if have >= characters:
            break
    return "\n\n".join(texts)


def _by_layer(readings: list[Reading]) -> list[dict[str, Any]]:
    """What every layer needs with its best heads and with all, for the record."""
    whole = {reading.layer: reading.share for reading in readings if reading.heads is None}
    return [
        {"layer": r.layer, "heads": r.heads and list(r.heads), "share": r.share, "all_heads": whole[r.layer]}
        for r in best_readings(readings)
    ]
