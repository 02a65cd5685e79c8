"""Block sparsity beside its peers on one pretrained model and one calibration text, nothing trained.

Wanda, SparseGPT, RIA and magnitude; unstructured, 2:4, 4:8 and the schedule's tiers; then the mix of tiers that is
found for as many bytes as the schedule's last row, and for those of plain 2:4. Each text is cut in two: the first
half is calibrated on (a mixture of all texts), the second evaluated on. Runs that are finished in a `--folder` are
not repeated, so that it may be stopped at any time; the models they leave are removed once they are measured. Five
to six hours of one core for a model of 135 M parameters. `block_tuning` goes on from here with training,
`block_official` compares with the authors' code.
"""

import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.experiments.runs import ROOT, claim, halves, once, say, validated
from bench.tables import figures
from lightning_modules.block_sparsity.demotion import Ratios
from lightning_modules.block_sparsity.pruner import packed_bits

RECORDS = "block_peers.jsonl"
COMMAND = "python -m bench experiment block_peers --model FOLDER --texts NAME=FILE,NAME=FILE"
PRUNE = "configs/block_sparsity/oneshot.yaml"
SCHEDULE = "configs/block_sparsity/progressive.csv"
BLOCK, BATCH, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 2, 32, 24
LAST_ROW_BITS = 9.85  # what the schedule's last row takes with top-k blocks of 10 weights
TWO_FOUR_BITS = 9.01
SMALL_BITS = 8.0  # where 2:4 blocks alone are too large
TOPK = (10, 32, 64)

NO_UPDATE = ("--model.update", "null")
METHODS: dict[str, tuple[str, ...]] = {
    "wanda": ("--model.score", "Wanda", *NO_UPDATE),
    "sparsegpt": ("--model.score", "ObsSaliency", "--model.update", "Obs"),
    "ria": ("--model.score", "Ria", *NO_UPDATE),
    "magnitude": ("--model.score", "Magnitude", *NO_UPDATE),
}
PATTERNS = ("unstructured", "2:4", "4:8")


@dataclass(frozen=True)
class Arm:
    """One way to prune.

    Args:
        what: In words.
        options: Of `main.py prune`.
        bits: That a pruned weight takes in a file with 16-bit values: packed blocks, or values and a bitmap.
        seeds: Each draws its own calibration text.
    """

    what: str
    options: tuple[str, ...]
    bits: float
    seeds: tuple[int, ...] = (1,)


def mix(bits: float, topk: str = "auto") -> tuple[str, ...]:
    """Options that ask for the mix of tiers that loses least in so many bits per weight."""
    chosen = ("--model.target_bits", str(bits), "--model.topk", topk, "--model.scope", "global")
    return ("--model.pattern", "tiers", *chosen, *METHODS["sparsegpt"])


def arms() -> dict[str, Arm]:
    """All of them by name, those that run with several seeds first: what is compared before what is varied."""
    found: dict[str, Arm] = {}
    for name, bits in {"last-row": LAST_ROW_BITS, "two-four": TWO_FOUR_BITS}.items():
        what = f"the mix of tiers that is found for {bits} bits per weight, sparsegpt"
        found[f"mix-{name}"] = Arm(what, mix(bits), bits, (1, 2, 3))
    found["mix-dense-and-two-four"] = Arm(  # as many of each everywhere
        f"dense and 2:4 blocks alone, in {LAST_ROW_BITS} bits per weight, sparsegpt",
        (*METHODS["sparsegpt"], "--model.pattern", "tiers", *shares("0.1203,0.8797,0"), "--model.scope", "global"),
        LAST_ROW_BITS,
    )
    # what a top-k tier is worth: "auto" has none where 2:4 alone is small enough
    for k in TOPK:
        what = f"the mix that is found for {LAST_ROW_BITS} bits per weight with top-{k} blocks, sparsegpt"
        found[f"mix-top-{k}"] = Arm(what, mix(LAST_ROW_BITS, str(k)), LAST_ROW_BITS)
    what = f"the mix of tiers that is found for {SMALL_BITS:g} bits per weight, sparsegpt"
    found["mix-small"] = Arm(what, mix(SMALL_BITS), SMALL_BITS)
    rows = [line.split(",") for line in (ROOT / SCHEDULE).read_text().splitlines()[1:]]
    for pattern in PATTERNS:
        for method, options in METHODS.items():
            seeds = (1, 2, 3) if pattern == "2:4" and method in ("wanda", "sparsegpt") else (1,)
            asked = (*options, "--model.pattern", pattern, *shares("0,1,0"))
            bits = _packed("0,1,0") if pattern == "2:4" else 16 / 2 + 1
            found[f"{pattern}-{method}"] = Arm(f"{pattern}, {method}", asked, bits, seeds)
    for row in reversed(rows):
        last = row is rows[-1]
        for method in METHODS if last else ("wanda", "sparsegpt"):
            seeds = (1, 2, 3) if last and method == "sparsegpt" else (1,)
            given = ",".join(row[1:4])
            asked = (*METHODS[method], "--model.pattern", "tiers", *shares(given))
            what = f"tiers {'/'.join(row[1:4])}, {method}"
            found[f"tiers-{row[0]}-{method}"] = Arm(what, asked, _packed(given), seeds)
    return dict(sorted(found.items(), key=lambda item: -len(item[1].seeds)))


def _packed(row: str) -> float:
    return packed_bits(Ratios(*map(float, row.split(","))), block=16, k=10)


def shares(row: str) -> tuple[str, ...]:
    """Options that ask for these shares of dense, 2:4 and top-k blocks."""
    named = zip(("dense", "mid_2_4", "topk"), row.split(","), strict=True)
    return tuple(part for name, share in named for part in (f"--model.schedule.{name}", share))


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Measure and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder.
        texts: Texts by name.

    Raises:
        ValueError: A text too short to be cut in two, or a folder that ``claim`` refuses.
    """
    claim(folder, model, *texts.values(), model=model.name, texts={n: str(p) for n, p in texts.items()})
    held_out = halves(folder, texts)
    dense = evaluate(folder / "dense", model, folder, held_out)
    figure(records, model, "dense", "the dense model", [dense], dense, COMMAND, bits=16)
    for name, arm in arms().items():
        found, tiers = [], dict[str, Any]()
        for seed in arm.seeds:
            options = (*arm.options, "--seed_everything", str(seed))
            ppl, tiers = measured(folder, model, held_out, f"{name}-{seed}", "prune", PRUNE, seed, options)
            found.append(ppl)
        figure(records, model, name, f"{arm.what}, nothing trained", found, dense, COMMAND, tiers, bits=arm.bits)


def data(model: Path, folder: Path, evaluated: Path) -> tuple[str, ...]:
    """Options for text: calibration on the first halves, evaluation on one of the others."""
    files = ("--data", "TextCorpus", "--data.train", str(folder / "calibration.json"), "--data.val", str(evaluated))
    shape = ("--data.block_size", str(BLOCK), "--data.batch_size", str(BATCH))
    return (*files, "--data.tokenizer", str(model), *shape, "--data.max_val_blocks", str(EVALUATION_BLOCKS))


def evaluate(place: Path, model: Path, folder: Path, held_out: Mapping[str, Path], pattern: str = "tiers") -> Any:
    """Perplexity on every text, each measured unless it has been."""
    start = ("--model.pretrained", str(model), "--model.dtype", "fast")
    options = (*start, "--model.topk", "null", "--model.pattern", pattern)
    return {
        name: validated(place / f"on-{name}", PRUNE, *data(model, folder, text), *options)
        for name, text in held_out.items()
    }


def measured(
    folder: Path,
    model: Path,
    held_out: Mapping[str, Path],
    name: str,
    command: str,
    config: str,
    seed: int,
    options: tuple[str, ...],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Prune (or tune) once and evaluate on every text.

    Returns:
        Perplexities by text; and what the command recorded of the tiers.
    """
    place = folder / name
    place.mkdir(exist_ok=True)
    pattern = options[options.index("--model.pattern") + 1] if "--model.pattern" in options else "tiers"
    base = data(model, folder, next(iter(held_out.values())))
    base = (*base, "--model.pretrained", str(model), "--model.output", str(place / "model"))
    base = (*base, "--model.calibration_seed", str(seed), "--model.calibration_blocks", str(CALIBRATION_BLOCKS))
    done = once(place / "run", command, config, *base, *options)
    tiers: dict[str, Any] = done["tiers"]
    # `prune` has measured what it left on the text that it was given
    found = {next(iter(held_out)): tiers["iterations"][-1]["ppl"]} if command == "prune" else {}
    left = {name: text for name, text in held_out.items() if name not in found}
    found |= evaluate(place, place / "model", folder, left, pattern)
    for large in (place / "model", *(place / "run/runs").glob("*/checkpoints")):  # gigabytes, and measured
        shutil.rmtree(large, ignore_errors=True)
    say(f"{name}: " + ", ".join(f"{text} {ppl:.2f}" for text, ppl in found.items()))
    return found, tiers


def figure(
    records: Path,
    model: Path,
    arm: str,
    what: str,
    found: list[dict[str, float]],
    dense: Mapping[str, float],
    command: str,
    tiers: Mapping[str, Any] | None = None,
    calibration_blocks: int = CALIBRATION_BLOCKS,
    tuned_tokens: int = 0,
    limit: float | None = None,
    bits: float | None = None,
) -> None:
    """One figure a text: mean over the seeds of the perplexity over the dense model's.

    Args:
        records: File that they are appended to.
        model: What was pruned.
        arm: Name of the figures, before the text's.
        what: In words.
        found: Perplexities by text, one a seed.
        dense: The dense model's.
        command: What measures them again.
        tiers: What was recorded of the tiers, of the last seed.
        calibration_blocks: Blocks of text that it was pruned on.
        tuned_tokens: Tokens that it was tuned on.
        limit: What the ratio should not exceed.
        bits: See ``Arm``.
    """
    ends = {} if tiers is None else {**tiers["iterations"][-1], "sparsity": tiers["sparsity"]}
    for text, reference in dense.items():
        values = [ppl[text] for ppl in found]
        ratios = [value / reference for value in values]
        ratio = statistics.mean(ratios)
        zeros = f", {100 * ends['sparsity']:.1f} % zeros" if ends else ""
        figures.append(
            records,
            figure=f"{arm}-{text}",
            what=f"{what}{zeros}: perplexity on {text} over dense ({reference:.1f} → {statistics.mean(values):.1f})",
            value=ratio,
            spread=figures.spread(ratios),
            unit="×",
            target="report" if limit is None else f"≤ {limit} ×",
            reached=None if limit is None else ratio <= limit,
            command=command,
            details={
                "model": model.name,
                "arm": arm,
                "text": text,
                "ppl": values,
                "dense_ppl": reference,
                "calibration_tokens": BLOCK * calibration_blocks,
                "evaluated_tokens": BLOCK * EVALUATION_BLOCKS,
                "tuned_tokens": tuned_tokens,
                "tiers": ends or None,
                "bits": bits,
            },
        )
