"""Ways to remove parts of a pretrained model at one size: perplexity on texts not calibrated on.

Each text is cut in two: the first halves are the mixture that every arm calibrates on, the second halves are evaluated.
The seed draws the blocks of the mixture. Published methods run by their own settings, as far as one model class can
hold their result, and once more with Pare's refit; some arms are then recovered alike, by a few steps of low-rank
adapters on the calibration text, beside the dense model tuned alike. Chance is in the calibration text and in
``Random``: arms that are compared run with three seeds, variations with one.

A budget and a seed are measured in a process of their own (``main``), in which the model is loaded once; scores are
kept for all budgets. What is compared comes before what is varied, and what nothing is trained for before recoveries,
which take longest. Figures are appended after every seed, of all that is there. Killed, it goes on with the rest.
"""

import argparse
import copy
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.experiments.runs import claim, halves, json_lines, say
from bench.tables import figures
from common.progress import stage
from common.randomness import run_seed
from common.records import record
from lightning_modules.data.text import TextCorpus
from lightning_modules.loading import load
from lightning_modules.perplexity import validation_perplexity
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.budget import channel_multiple
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.compensation.bias import Bias
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.compensation.reconstruction import Reconstruction
from lightning_modules.structured_pruning.compensation.rotation import Rotation
from lightning_modules.structured_pruning.compensation.unchanged import Unchanged
from lightning_modules.structured_pruning.importance import Importance
from lightning_modules.structured_pruning.importance.fluctuation import Fluctuation
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.structured_pruning.importance.magnitude import Magnitude
from lightning_modules.structured_pruning.importance.random import Random
from lightning_modules.structured_pruning.importance.refitted import Refitted
from lightning_modules.structured_pruning.importance.weight_taylor import WeightTaylor
from lightning_modules.structured_pruning.layers import family
from lightning_modules.structured_pruning.layout import DropBy, Layout
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.planner import Planner
from lightning_modules.structured_pruning.refitting import compensate
from lightning_modules.structured_pruning.rounds import short_recovery
from lightning_modules.structured_pruning.slicing import slice_model

RECORDS = "structured_peers.jsonl"
COMMAND = "python -m bench experiment structured_peers --model FOLDER --texts NAME=FILE,NAME=FILE"
BLOCK, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 32, 16
BUDGETS = {0.25: 1.30, 0.10: 1.10, 0.50: 2.0}  # share of the decoder, and perplexity over dense to reach
SEEDS = (1, 2, 3)
FIRST, LAST = 4, 3  # layers that LLM-Pruner leaves whole
RECOVERY_STEPS, RECOVERY_RATE = 16, 1e-3
DENSE = "dense"
WHEN = ("before", "after")


@dataclass(frozen=True)
class Arm:
    """A way to prune.

    Attributes:
        what: In words.
        importance: Made for a seed.
        compensation: What follows slicing.
        drop_by: Whole layers alone go, in this order, as many as fit the budget; None for parts of layers.
        uniform: The same rate in the middle layers, by LLM-Pruner's protocol, in a free shape.
        seeds: With how many seeds it runs.
        recovered: Whether it is compared: measured before the variations and, with the first seed, recovered, too.
        text: How many times the calibration text of the others it has.
    """

    what: str
    importance: Callable[[int], Importance] = lambda seed: GateTaylor()
    compensation: Compensation = Unchanged()  # noqa: RUF009 - it has no state
    drop_by: DropBy | None = None
    uniform: bool = False
    seeds: int = 3
    recovered: bool = True
    text: int = 1


def _varied(what: str, compensation: Compensation | None = None, scored: Importance | None = None) -> Arm:
    """The default with something else; it runs once."""
    importance = scored or GateTaylor()
    return Arm(what, lambda seed: importance, compensation or LeastSquares(), seeds=1, recovered=False)


def _refitted(arm: Arm) -> Arm:
    """A published way, refitted as the default is."""
    given = (arm.importance, LeastSquares(), arm.drop_by, arm.uniform)
    return Arm(f"{arm.what}, refitted as Pare's", *given, seeds=1, recovered=False)


PEERS = {
    "flap": Arm("FLAP: fluctuation, mean outputs as biases", lambda seed: Fluctuation(), Bias()),
    "llm-pruner": Arm(
        "LLM-Pruner: |weight · gradient|, the same rate in the middle layers", lambda seed: WeightTaylor(), uniform=True
    ),
    "shortgpt": Arm("ShortGPT: layers of least influence", drop_by="block_influence"),
    "shortened-llama": Arm("Shortened LLaMA: layers of least damage", drop_by="damage"),
    "magnitude": Arm("size of weights", lambda seed: Magnitude(), seeds=1),
    "random": Arm("chance", lambda seed: Random(seed)),
}
ARMS = {
    "pare": Arm("the default: shape tried, gates' importance, refitted", compensation=LeastSquares()),
    "pare-unrefitted": Arm("the default without refitting"),
    **PEERS,
    **{f"{name}-refitted": _refitted(arm) for name, arm in PEERS.items()},
    "pare-more-text": replace(_varied("the default, calibrated on four times the text"), text=4),
    "pare-following": _varied("the default, refitted to the dense model's states", LeastSquares(follow=True)),
    "pare-learned": _varied(
        "the default, refitted to the dense model's states, and MLPs then learn what is missing", Reconstruction()
    ),
    "pare-all-alike": _varied("the default, all tokens weighed alike", LeastSquares(relative=False)),
    "pare-refitted-scores": _varied("the default, importance after refitting", scored=Refitted()),
    "pare-rotation": _varied("the default, refitted by a rotation (RCPU)", Rotation()),
}


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Prune, evaluate, and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of the model.
        texts: Texts by name.

    Raises:
        ValueError: A text too short to be cut in two, or a folder that ``claim`` refuses.
    """
    commit = claim(folder, model, *texts.values(), model=model.name, texts={n: str(p) for n, p in texts.items()})
    evaluated = halves(folder, texts)
    for budget, most in BUDGETS.items():
        found: list[dict[str, Any]] = []
        for seed in SEEDS:
            found += _lines(folder, model, evaluated, seed, budget)
            for text in texts:
                _figures(records, model, budget, most, text, found, commit)


def _figures(
    records: Path,
    model: Path,
    budget: float,
    most: float,
    text: str,
    found: Sequence[dict[str, Any]],
    commit: str | None,
) -> None:
    """What the seeds so far say of one budget and text."""
    for name, arm in ARMS.items():
        for when in WHEN:
            if lines := _of(found, name, when):
                target = most if (name, when) == ("pare", "before") else None
                _append(records, model, name, arm, budget, text, lines, when, found, target, commit)
    _margin(records, budget, text, found, commit)


def _lines(folder: Path, model: Path, texts: Mapping[str, Path], seed: int, budget: float) -> Iterator[dict[str, Any]]:
    """The cells of one seed and budget: those of before, then what is missing, as they come."""
    kept, wanted = folder / f"seed-{seed}.jsonl", _wanted(seed, budget)
    known = [line for line in _known(kept) if _key(line) in wanted]
    yield from known
    if len(known) == len(wanted):
        return
    given = ["--model", str(model), "--train", str(folder / "calibration.json")]
    given += ["--seed", str(seed), "--budget", str(budget)]
    given += ["--texts", ",".join(f"{name}={path}" for name, path in texts.items())]
    given += ["--cache", str(folder / "cache"), "--kept", str(kept)]
    for line in json_lines(__name__, *given, log=folder / f"seed-{seed}.log"):
        record.append(kept, line)
        shown = ", ".join(f"{text} {value:.1f}" for text, value in line["ppl"].items())
        say(f"seed {seed}, {line['arm']}, {line['budget']:.0%}, {line['when']}: {shown}")
        yield line


def _key(line: Mapping[str, Any]) -> tuple[str, float, str]:
    return line["arm"], line["budget"], line["when"]


def _of(found: Sequence[dict[str, Any]], arm: str, when: str) -> list[dict[str, Any]]:
    """The cells of an arm."""
    return [one for one in found if (one["arm"], one["when"]) == (arm, when)]


def _known(kept: Path) -> list[dict[str, Any]]:
    """The cells that a file has whole; one torn by a kill is measured again."""
    return record.read(kept)[0] if kept.exists() else []


def _wanted(seed: int, budget: float) -> list[tuple[str, float, str]]:
    """Cells of a seed and budget, the dense model's first."""
    arms = {name: arm for name, arm in ARMS.items() if seed in SEEDS[: arm.seeds]}
    compared = [name for name, arm in arms.items() if arm.recovered]
    found = [(DENSE, 0.0, "before"), *((name, budget, "before") for name in compared)]
    if seed == SEEDS[0]:
        found += [(DENSE, 0.0, "after"), *((name, budget, "after") for name in compared)]
    return found + [(name, budget, "before") for name in arms if name not in compared]


def cell(
    model: Any, base: str, data: Mapping[str, Any], arm: Arm | None, budget: float, seed: int, cache: Path, when: str
) -> dict[str, Any]:
    """One way to prune, measured.

    Args:
        model: The dense model; not changed.
        base: Its folder.
        data: DataModules by name of the text they evaluate on, all with the same calibration text, set up.
        arm: The way; None leaves the model whole.
        budget: Share of the decoder to remove.
        seed: Of what is drawn.
        cache: Folder for damages, scores and trials.
        when: "before" or "after" a short recovery.

    Returns:
        ``removed``, the share that went, and ``ppl`` by text.
    """
    blocks = CALIBRATION_BLOCKS * (arm.text if arm is not None else 1)
    batches = next(iter(data.values())).calibration(blocks, run_seed())
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    if arm is None:
        made = copy.deepcopy(model)
    else:
        count = math.floor(budget * len(model.model.layers)) if arm.drop_by else None
        layout = _layout(model, arm, count)
        importance = arm.importance(seed)
        planner = Planner(model, base, batches, importance, layout, cache, stage, compensation=arm.compensation)
        target = budget * decoder if count is None else decoder * count // len(model.model.layers)
        plan = planner.plan(round(target), {})
        made = slice_model(model, plan)
        compensate(model, made, plan, batches, arm.compensation)
    left = sum(p.numel() for p in made.model.layers.parameters())
    if when == "after":
        torch.manual_seed(seed)  # the adapters' first values
        with stage("Recovery", RECOVERY_STEPS, "steps") as done:
            made, _ = short_recovery(made, batches, RECOVERY_STEPS, RECOVERY_RATE, done)
    ppl = {name: validation_perplexity(made, one) for name, one in data.items()}
    return {"removed": 1 - left / decoder, "ppl": ppl}


def _layout(model: Any, arm: Arm, count: int | None) -> Layout:
    """What an arm asks of a plan; ``count`` layers go whole, or what it finds."""
    shape = ModelShape.of(model, model.dtype.itemsize)
    multiple, layers = channel_multiple(shape.shapes, None), len(shape.shapes)
    if arm.uniform:
        whole = (*range(FIRST), *range(layers - LAST, layers))
        return Layout("free", Uniform(), protect_layers=whole, multiple=multiple)
    if count is not None:
        return Layout(drop_layers=count, drop_by=arm.drop_by or "damage", multiple=multiple)
    return Layout(multiple=multiple)


def _ratios(lines: Sequence[dict[str, Any]], text: str, when: str, found: Sequence[dict[str, Any]]) -> list[float]:
    """Perplexities of an arm over the dense model's, left alone or tuned alike, one a seed."""
    dense: float = _of(found, DENSE, when)[0]["ppl"][text]
    return [one["ppl"][text] / dense for one in lines]


def _append(
    records: Path,
    model: Path,
    name: str,
    arm: Arm,
    budget: float,
    text: str,
    lines: Sequence[dict[str, Any]],
    when: str,
    found: Sequence[dict[str, Any]],
    most: float | None,
    commit: str | None,
) -> None:
    ratios = _ratios(lines, text, when, found)
    removed = statistics.mean(one["removed"] for one in lines)
    tuned = f"after {RECOVERY_STEPS} steps of adapters, over the dense model tuned alike"
    compared = "nothing trained, over the dense model" if when == "before" else tuned
    figures.append(
        records,
        figure=f"{name}-{100 * budget:g}-{text}-{when}",
        what=f"{arm.what}; {removed:.1%} of the decoder removed: perplexity on {text}, {compared}",
        value=statistics.mean(ratios),
        spread=figures.spread(ratios),
        unit="×",
        target="report" if most is None else f"≤ {most:g} ×",
        reached=None if most is None else statistics.mean(ratios) <= most,
        command=COMMAND,
        details={
            "model": model.name,
            "arm": name,
            "budget": f"{budget:.0%}",
            "text": text,
            "when": when,
            "recovery": {"steps": RECOVERY_STEPS, "rate": RECOVERY_RATE} if when == "after" else None,
            "removed": removed,
            "ratios": ratios,
            "measured_at": commit,
        },
    )


def _margin(records: Path, budget: float, text: str, found: Sequence[dict[str, Any]], commit: str | None) -> None:
    """How far the best published way is behind the default, and whether that is more than their spread."""
    ratios = {
        name: _ratios(_of(found, name, "before"), text, "before", found)
        for name, arm in ARMS.items()
        if name == "pare" or name in PEERS
    }
    own = ratios.pop("pare")
    best = min(ratios, key=lambda name: statistics.mean(ratios[name]))
    ahead = statistics.mean(ratios[best]) - statistics.mean(own)
    spread = sum(figures.spread(values) or 0.0 for values in (own, ratios[best]))
    figures.append(
        records,
        figure=f"margin-{100 * budget:g}-{text}",
        what=f"{best}, the best published way, over the default: perplexity on {text}, {budget:.0%} of the decoder "
        "removed, nothing trained",
        value=statistics.mean(ratios[best]) / statistics.mean(own),
        unit="×",
        target="above 1 × by more than the spread of both",
        reached=ahead > spread if len(own) > 1 else None,
        command=COMMAND,
        details={"ahead": ahead, "spread": spread, "best": best, "measured_at": commit},
    )


def main() -> None:
    """Print a line for every cell of a seed and budget that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "texts", "cache", "kept"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the choice of calibration text")
    parser.add_argument("--budget", type=float, required=True, help="share of the decoder to remove")
    options = parser.parse_args()
    os.environ["PL_GLOBAL_SEED"] = str(options.seed)  # what `run_seed` reads: decides the order of the text
    model = load(options.model, "fast", supported=family)
    data = {name: _data(options.model, options.train, path) for name, path in _pairs(options.texts)}
    done = {_key(line) for line in _known(Path(options.kept))}
    for name, budget, when in _wanted(options.seed, options.budget):
        if (name, budget, when) not in done:
            given = (model, options.model, data, ARMS.get(name), budget, options.seed, Path(options.cache), when)
            told = {"arm": name, "budget": budget, "when": when, "seed": options.seed}
            print(json.dumps(told | cell(*given)), flush=True)


def _pairs(texts: str) -> list[list[str]]:
    return [one.split("=", 1) for one in texts.split(",")]


def _data(model: str, train: str, evaluated: str) -> TextCorpus:
    sizes: dict[str, Any] = {"block_size": BLOCK, "batch_size": 2, "max_val_blocks": EVALUATION_BLOCKS}
    data = TextCorpus(train, evaluated, tokenizer=model, **sizes)
    data.prepare_data()
    data.setup("fit")
    return data


if __name__ == "__main__":
    main()
