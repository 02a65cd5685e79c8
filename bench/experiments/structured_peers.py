"""Ways to remove parts of a pretrained model at one size: perplexity on texts not calibrated on, nothing trained.

Each text is cut in two: the first halves are the mixture that every arm calibrates on, the second halves are evaluated.
The seed draws the blocks of the mixture. Published methods run by their own settings, as far as one model class can
hold their result. Killed, it goes on.
"""

import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from bench.experiments.runs import claim, halves, once, validated
from bench.tables import figures
from common.files import write_text

RECORDS = "structured_peers.jsonl"
COMMAND = "python -m bench experiment structured_peers --model FOLDER --texts NAME=FILE,NAME=FILE"
CONFIG = "configs/structured_pruning/prune.yaml"
BLOCK, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 32, 16
BUDGETS = {0.10: 1.10, 0.25: 1.30, 0.50: 2.0}  # share of the decoder, and perplexity over dense to reach
SEEDS = (1, 2, 3)
FIRST, LAST = 4, 3  # layers that LLM-Pruner leaves whole


@dataclass(frozen=True)
class _Arm:
    """A way to prune.

    Attributes:
        what: In words.
        arguments: Of `prune`.
        depth: Whole layers alone go, as many as fit the budget.
        seeded: Whether the result depends on calibration text or chance; others run once.
    """

    what: str
    arguments: tuple[str, ...] = ()
    depth: bool = False
    seeded: bool = True


_PLAIN = ("--model.compensation", "Unchanged")
_FREE = ("--model.shape", "free", *_PLAIN)
ARMS = {
    "pare": _Arm("the default: shape tried, gates' importance, refitted"),
    "pare-refitted-scores": _Arm("the same, importance after refitting", ("--model.importance", "Refitted")),
    "pare-unrefitted": _Arm("the default without refitting", _PLAIN),
    "pare-rotation": _Arm("the default, refitted by a rotation (RCPU)", ("--model.compensation", "Rotation")),
    "flap": _Arm(
        "FLAP: fluctuation, mean outputs as biases",
        ("--model.importance", "Fluctuation", "--model.compensation", "Bias"),
    ),
    "llm-pruner": _Arm(
        "LLM-Pruner: |weight · gradient|, the same rate in the middle layers",
        ("--model.importance", "WeightTaylor", "--model.allocation", "Uniform", *_FREE),
    ),
    "shortgpt": _Arm(
        "ShortGPT: layers of least influence", ("--model.drop_by", "block_influence", *_PLAIN), depth=True
    ),
    "shortened-llama": _Arm(
        "Shortened LLaMA: layers of least damage", ("--model.drop_by", "damage", *_PLAIN), depth=True
    ),
    "magnitude": _Arm("size of weights", ("--model.importance", "Magnitude", *_PLAIN)),
    "random": _Arm("chance", ("--model.importance", "Random", *_PLAIN)),
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
    mixture = folder / "calibration.json"
    evaluated = halves(folder, texts)
    layers = AutoConfig.from_pretrained(str(model)).num_hidden_layers
    data = {name: _data(model, mixture, path) for name, path in evaluated.items()}
    for budget in BUDGETS:
        for name, arm in ARMS.items():
            found = [
                _measured(folder, model, name, arm, layers, budget, seed, data)
                for seed in (SEEDS if arm.seeded else SEEDS[:1])
            ]
            for text in data:
                _append(records, model, name, arm, budget, text, [one[text] for one in found], commit)


def _data(model: Path, mixture: Path, evaluated: Path) -> tuple[str, ...]:
    files = ("--data", "TextCorpus", "--data.train", str(mixture))
    shape = ("--data.block_size", str(BLOCK), "--data.batch_size", "2", "--data.max_val_blocks", str(EVALUATION_BLOCKS))
    return (*files, "--data.val", str(evaluated), "--data.tokenizer", str(model), *shape)


def _measured(
    folder: Path,
    model: Path,
    name: str,
    arm: _Arm,
    layers: int,
    budget: float,
    seed: int,
    data: dict[str, tuple[str, ...]],
) -> dict[str, dict[str, float]]:
    """Perplexities before and after, and parameters that went as a share of the decoder's, by text; measured once."""
    place = folder / f"{name}-{100 * budget:g}-{seed}"
    left = place / "found.json"
    if left.is_file():
        known: dict[str, dict[str, float]] = json.loads(left.read_text())
        return known
    given = ["--model.base", str(model), "--model.output", str(place / "model"), "--seed_everything", str(seed)]
    given += [
        "--model.dtype",
        "bfloat16",
        "--model.calibration_blocks",
        str(CALIBRATION_BLOCKS),
        "--model.cache_dir",
        str(folder / "cache"),
    ]
    given += [*arm.arguments]
    if arm.depth:
        count = int(budget * layers)
        given += ["--model.drop_layers", str(count), "--model.budget", repr(count / layers)]
    else:
        given += ["--model.budget", str(budget)]
    if name == "llm-pruner":
        whole = [*range(FIRST), *range(layers - LAST, layers)]
        given += ["--model.protect_layers", json.dumps(whole)]
    first, *others = data
    done = once(place / first, "prune", CONFIG, *data[first], *given)
    structure = done["structure"]
    gone = structure["decoder_parameters_after"] / structure["decoder_parameters_before"]
    found = {first: {"before": structure["ppl_before"], "after": structure["ppl_after"]}}
    for text in others:
        dense = validated(
            folder / f"dense-{text}", CONFIG, *data[text], "--model.base", str(model), "--model.output", str(model)
        )
        pruned = validated(place / text, CONFIG, *data[text], *given)
        found[text] = {"before": dense, "after": pruned}
    measured = {text: {**both, "removed": 1 - gone} for text, both in found.items()}
    write_text(left, json.dumps(measured))
    shutil.rmtree(place / "model")  # ninety models are more than most disks hold
    return measured


def _append(
    records: Path,
    model: Path,
    name: str,
    arm: _Arm,
    budget: float,
    text: str,
    found: list[dict[str, float]],
    commit: str | None,
) -> None:
    ratios = [one["after"] / one["before"] for one in found]
    most = BUDGETS[budget] if name == "pare" else None
    removed = statistics.mean(one["removed"] for one in found)
    figures.append(
        records,
        figure=f"{name}-{100 * budget:g}-{text}",
        what=f"{arm.what}; {removed:.1%} of the decoder removed, nothing trained: perplexity on {text} over the dense "
        f"model's ({found[0]['before']:.1f})",
        value=statistics.mean(ratios),
        spread=statistics.stdev(ratios) if len(ratios) > 1 else None,
        unit="×",
        target="report" if most is None else f"≤ {most:g} ×",
        reached=None if most is None else statistics.mean(ratios) <= most,
        command=COMMAND,
        details={
            "model": model.name,
            "arm": name,
            "budget": f"{budget:.0%}",
            "text": text,
            "removed": removed,
            "ratios": ratios,
            "dense_ppl": found[0]["before"],
            "measured_at": commit,
        },
    )
