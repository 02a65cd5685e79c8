"""Block sparsity with fine-tuning: every way of pruning on the same tokens, the dense model tuned alike beside them.

Full fine-tuning with masks held, in bf16 mixed precision, half of the loss by distillation from the dense model.
`block_tuning` takes few tokens and three seeds: progressive beside one-shot, tiers beside plain 2:4; about two hours
and a half on two cores for a model of 135 M parameters. `block_million` takes a million tokens for the best mix of
tiers and the dense model: about as long. Texts, halves and resumption are as in `block_peers`; for training give much
text.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.experiments.block_peers import BATCH, BLOCK, LAST_ROW_BITS, METHODS, SCHEDULE, figure, measured, mix
from bench.experiments.runs import ROOT, claim, halves, losses
from bench.tables import figures

RECORDS = "block_peers.jsonl"
COMMAND = "python -m bench experiment block_tuning --model FOLDER --texts NAME=FILE,NAME=FILE"
FIT = "configs/block_sparsity/progressive.yaml"
TOKENS, SEEDS = 1 << 16, (1, 2, 3)
LEARNING_RATE, WARMUP = 2e-4, 5
TUNING_CALIBRATION_BLOCKS = 16  # in each of up to five iterations


@dataclass(frozen=True)
class Arm:
    """One way to prune and tune.

    Args:
        what: In words.
        rows: "all" of the schedule, its "last" one, or shares of dense, 2:4 and top-k blocks.
        options: Of `main.py fit`.
    """

    what: str
    rows: str
    options: tuple[str, ...]


ARMS = {
    "dense": Arm("the dense model", "1,0,0", METHODS["wanda"]),
    "tiers-progressive": Arm("the schedule's tiers, five iterations", "all", METHODS["sparsegpt"]),
    "tiers-oneshot": Arm("the schedule's last tiers at once", "last", METHODS["sparsegpt"]),
    "mix-progressive": Arm(f"the mix found for {LAST_ROW_BITS} bits, five iterations", "all", mix(LAST_ROW_BITS)),
    "mix-oneshot": Arm(f"the mix found for {LAST_ROW_BITS} bits, at once", "last", mix(LAST_ROW_BITS)),
    "2:4": Arm("plain 2:4", "0,1,0", (*METHODS["sparsegpt"], "--model.pattern", "2:4")),
}


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Measure and append the figures. Arguments and errors as for ``block_peers.run``."""
    found, tuned = tune(records, folder, model, texts, ARMS, TOKENS, SEEDS, COMMAND, "tuned")
    for kind in ("tiers", "mix"):
        _progress(records, kind, found[f"{kind}-progressive"], found[f"{kind}-oneshot"], tuned)


def tune(
    records: Path,
    folder: Path,
    model: Path,
    texts: Mapping[str, Path],
    chosen: Mapping[str, Arm],
    tokens: int,
    seeds: tuple[int, ...],
    command: str,
    prefix: str,
    limits: Mapping[str, float] | None = None,
) -> tuple[dict[str, list[dict[str, float]]], int]:
    """Tune some arms, the first of which is the dense model.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder.
        texts: Texts by name.
        chosen: The arms.
        tokens: How many each is tuned on at most: all iterations have equally many whole steps.
        seeds: Of calibration text and order.
        command: What measures them again.
        prefix: What their figures' names begin with.
        limits: What a perplexity over that of the dense model should not exceed, by arm.

    Returns:
        Perplexities by arm and text, one a seed; and the tokens that each was tuned on.
    """
    asked = {"texts": {name: str(path) for name, path in texts.items()}, "tokens": tokens}
    claim(folder, model, *texts.values(), model=model.name, **asked)
    held_out = halves(folder, texts)
    found: dict[str, list[dict[str, float]]] = {}
    dense, tuned = dict[str, float](), 0
    for name, arm in chosen.items():
        tiers: dict[str, Any] = {}
        found[name] = []
        for seed in seeds:
            place = folder / f"{prefix}-{name}-{seed}"
            place.mkdir(exist_ok=True)
            options = (*arm.options, *_tuning(place, arm.rows, tokens, model), "--seed_everything", str(seed))
            ppl, tiers = measured(folder, model, held_out, place.name, "fit", FIT, seed, options)
            found[name].append(ppl)
            tuned = BLOCK * BATCH * (1 + max(losses(place / "run")))  # a killed run has not logged all of its steps
        if not dense:
            dense = {text: sum(ppl[text] for ppl in found[name]) / len(seeds) for text in held_out}
        what = f"{arm.what}, {tuned:,} tokens of fine-tuning, the dense model tuned alike"
        sizes = {"calibration_blocks": TUNING_CALIBRATION_BLOCKS, "tuned_tokens": tuned}
        limit = (limits or {}).get(name)
        figure(records, model, f"{prefix}-{name}", what, found[name], dense, command, tiers, **sizes, limit=limit)
    return found, tuned


def _progress(
    records: Path, kind: str, progressive: list[dict[str, float]], oneshot: list[dict[str, float]], tokens: int
) -> None:
    """Five iterations over one at equal tokens, seed by seed."""
    for text in progressive[0]:
        ratios = [a[text] / b[text] for a, b in zip(progressive, oneshot, strict=True)]
        mean, spread = statistics.mean(ratios), figures.spread(ratios)
        figures.append(
            records,
            figure=f"progressive-{kind}-{text}",
            what=f"{kind}: five iterations over one, {tokens:,} tokens each, perplexity on {text}",
            value=mean,
            spread=spread,
            unit="×",
            target="< 1 beyond the spread",
            reached=mean + (spread or 0.0) < 1,
            command=COMMAND,
            details={"ratios": ratios},
        )


def _tuning(place: Path, rows: str, tokens: int, model: Path) -> tuple[str, ...]:
    """Options of a run that trains on so many tokens by the whole schedule, by its last row, or by a row of its own."""
    lines = (ROOT / SCHEDULE).read_text().splitlines()
    epochs = sum(int(line.split(",")[-1]) for line in lines[1:])
    path = place / "schedule.csv"
    if rows == "all":
        path.write_text("\n".join(lines) + "\n")
    else:
        shares = ",".join(lines[-1].split(",")[1:4]) if rows == "last" else rows
        path.write_text(f"dense,mid_2_4,topk,epochs\n{shares},{epochs}\n")
    steps = tokens // (BLOCK * BATCH * epochs)
    return (
        *("--model.schedule.path", str(path), "--trainer.limit_train_batches", str(steps)),
        *("--trainer.precision", "bf16-mixed", "--trainer.limit_val_batches", "1"),
        *("--model.teacher", str(model), "--model.distill_weight", "0.5"),
        *("--model.calibration_blocks", str(TUNING_CALIBRATION_BLOCKS)),
        *("--model.learning_rate", str(LEARNING_RATE), "--model.warmup_steps", str(WARMUP)),
        *("--ckpt_path", "auto"),  # goes on where it was killed
    )
