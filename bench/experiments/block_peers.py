"""Block sparsity beside its peers on one pretrained model and one calibration text, without and with fine-tuning.

Wanda, SparseGPT, RIA and magnitude; unstructured, 2:4, 4:8 and the schedule's tiers; then a few of them fine-tuned on
equally many tokens, the dense model alike, progressive beside one-shot. Each text is cut in two: the first half is
calibrated and tuned on (a mixture of all texts), the second evaluated on. Runs that are finished in a `--folder` are
not repeated, so that it may be stopped at any time; the models they leave are removed once they are measured.
"""

import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.experiments.runs import ROOT, claim, halves, once, say, validated
from bench.tables import figures

RECORDS = "block_peers.jsonl"
COMMAND = "python -m bench experiment block_peers --model FOLDER --texts NAME=FILE,NAME=FILE"
PRUNE, FIT = "configs/block_sparsity/oneshot.yaml", "configs/block_sparsity/progressive.yaml"
SCHEDULE = "configs/block_sparsity/progressive.csv"
SEEDS = (1, 2, 3)
BLOCK, BATCH, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 2, 32, 32
TOKENS = 1 << 17  # of fine-tuning, in as many epochs as the schedule has
LEARNING_RATE = 1e-4
LAST_ROW_BITS = 9.85  # what the schedule's last row takes with top-k blocks of 10 weights

NO_UPDATE = ("--model.update", "null")
METHODS: dict[str, tuple[str, ...]] = {
    "wanda": ("--model.score", "Wanda", *NO_UPDATE),
    "sparsegpt": ("--model.score", "ObsSaliency", "--model.update", "Obs"),
    "ria": ("--model.score", "Ria", *NO_UPDATE),
    "magnitude": ("--model.score", "Magnitude", *NO_UPDATE),
    "wanda-updated": ("--model.score", "Wanda", "--model.update", "Obs"),
}
PATTERNS = {"unstructured": "0,1,0", "2:4": "0,1,0", "4:8": "0,1,0"}
AUTO = ("--model.topk", "auto", "--model.target_bits", str(LAST_ROW_BITS), "--model.scope", "global")
# what is fine-tuned: method, and rows of the schedule (the last one, or all), and options
TUNED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dense": ("wanda", "1,0,0", ()),
    "tiers-oneshot": ("wanda-updated", "last", ()),
    "tiers-progressive": ("wanda-updated", "all", ()),
    "tiers-auto": ("wanda-updated", "last", AUTO),
    "2:4": ("sparsegpt", "0,1,0", ("--model.pattern", "2:4")),
    "tiers-oneshot-wanda": ("wanda", "last", ()),
    "unstructured": ("sparsegpt", "0,1,0", ("--model.pattern", "unstructured")),
}


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
    dense = {name: _validated(folder / "dense", model, folder, text, name) for name, text in held_out.items()}
    _figure(records, model, "dense", "the dense model", [dense], dense)
    for arm, (what, options) in untrained().items():
        found = [_measured(folder, model, held_out, f"{arm}-{seed}", "prune", seed, options) for seed in SEEDS]
        _figure(records, model, arm, f"{what}, nothing trained", *_split(found, dense))
    tuned: dict[str, float] = {}
    for arm, (method, rows, more) in TUNED.items():
        options = (*METHODS[method], *more)
        found = [
            _measured(folder, model, held_out, f"tuned-{arm}-{seed}", "fit", seed, options, rows) for seed in SEEDS
        ]
        if arm == "dense":
            tuned = {name: statistics.mean(ppl[name] for ppl, _ in found) for name in held_out}
        what = f"{arm} ({method}), {TOKENS:,} tokens of fine-tuning, over the dense model tuned alike"
        _figure(records, model, f"tuned-{arm}", what, *_split(found, tuned))


def untrained() -> dict[str, tuple[str, tuple[str, ...]]]:
    """What is pruned and not trained: description and options, by name."""
    arms: dict[str, tuple[str, tuple[str, ...]]] = {}
    rows = [line.split(",") for line in (ROOT / SCHEDULE).read_text().splitlines()[1:]]
    tiers = {f"tiers-{row[0]}": (",".join(row[1:4]), "tiers") for row in reversed(rows)}
    for pattern, (shares, kind) in {**{p: (s, p) for p, s in PATTERNS.items()}, **tiers}.items():
        for method, options in METHODS.items():
            if pattern not in tiers and method == "wanda-updated" and pattern != "2:4":
                continue
            arms[f"{pattern}-{method}"] = (
                f"{pattern}, {method}",
                (*options, "--model.pattern", kind, *_shares(shares)),
            )
    arms["tiers-auto"] = (
        f"tiers chosen for {LAST_ROW_BITS} bits per weight, wanda-updated",
        (*METHODS["wanda-updated"], *AUTO),
    )
    return arms


def _shares(shares: str) -> tuple[str, ...]:
    dense, mid, topk = shares.split(",")
    names = {"dense": dense, "mid_2_4": mid, "topk": topk}
    return tuple(part for name, share in names.items() for part in (f"--model.schedule.{name}", share))


def _data(model: Path, folder: Path, evaluated: Path) -> tuple[str, ...]:
    files = ("--data", "TextCorpus", "--data.train", str(folder / "calibration.json"), "--data.val", str(evaluated))
    shape = ("--data.block_size", str(BLOCK), "--data.batch_size", str(BATCH))
    return (*files, "--data.tokenizer", str(model), *shape, "--data.max_val_blocks", str(EVALUATION_BLOCKS))


def _validated(place: Path, pruned: Path, folder: Path, text: Path, name: str) -> float:
    options: tuple[str, ...] = ("--model.pretrained", str(pruned), "--model.topk", "null")
    pattern = place / "pattern"
    if pattern.exists():
        options = (*options, "--model.pattern", pattern.read_text())
    return validated(place / f"on-{name}", PRUNE, *_data(pruned, folder, text), *options)


def _measured(
    folder: Path,
    model: Path,
    held_out: Mapping[str, Path],
    name: str,
    command: str,
    seed: int,
    options: tuple[str, ...],
    rows: str | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Prune (or tune) once and evaluate on every text; what the command recorded of the tiers."""
    place = folder / name
    place.mkdir(exist_ok=True)
    kind = options[options.index("--model.pattern") + 1] if "--model.pattern" in options else "tiers"
    (place / "pattern").write_text(kind)
    first = next(iter(held_out.values()))
    base = (*_data(model, folder, first), "--model.pretrained", str(model), "--model.output", str(place / "model"))
    drawn = ("--seed_everything", str(seed), "--model.calibration_seed", str(seed))
    base = (*base, *drawn, "--model.calibration_blocks", str(CALIBRATION_BLOCKS), *options)
    if rows is not None:
        base = (*base, *_tuning(place, rows))
    done = once(place / "run", command, PRUNE if command == "prune" else FIT, *base)
    found = {text: _validated(place, place / "model", folder, path, text) for text, path in held_out.items()}
    shutil.rmtree(place / "model", ignore_errors=True)  # half a gigabyte, and measured
    shutil.rmtree(place / "run/checkpoints", ignore_errors=True)
    say(f"{name}: " + ", ".join(f"{text} {ppl:.2f}" for text, ppl in found.items()))
    return found, done["tiers"]


def _tuning(place: Path, rows: str) -> tuple[str, ...]:
    """Options of a run that trains on ``TOKENS`` by the whole schedule, by its last row, or by a row of its own."""
    lines = (ROOT / SCHEDULE).read_text().splitlines()
    epochs = sum(int(line.split(",")[-1]) for line in lines[1:])
    path = place / "schedule.csv"
    if rows == "all":
        path.write_text("\n".join(lines) + "\n")
    else:
        shares = ",".join(lines[-1].split(",")[1:4]) if rows == "last" else rows
        path.write_text(f"dense,mid_2_4,topk,epochs\n{shares},{epochs}\n")
    steps = TOKENS // (BLOCK * BATCH * epochs)
    return (
        *("--model.schedule.path", str(path), "--trainer.limit_train_batches", str(steps)),
        *("--model.learning_rate", str(LEARNING_RATE), "--model.warmup_steps", "5"),
    )


def _split(
    found: list[tuple[dict[str, float], dict[str, Any]]], dense: dict[str, float]
) -> tuple[list[dict[str, float]], dict[str, float], dict[str, Any]]:
    """Perplexities of all seeds, the dense model's, and the shares that the last one ended with."""
    ends = found[-1][1]["iterations"][-1]
    return [ppl for ppl, _ in found], dense, {**ends, "sparsity": found[-1][1]["sparsity"]}


def _figure(
    records: Path,
    model: Path,
    arm: str,
    what: str,
    found: list[dict[str, float]],
    dense: dict[str, float],
    tiers: dict[str, Any] | None = None,
) -> None:
    """One figure a text: mean over the seeds of the perplexity over the dense model's."""
    for text, reference in dense.items():
        ratios = [ppl[text] / reference for ppl in found]
        values = [ppl[text] for ppl in found]
        zeros = f", {100 * tiers['sparsity']:.1f} % zeros" if tiers else ""
        figures.append(
            records,
            figure=f"{arm}-{text}",
            what=f"{what}{zeros}: perplexity on {text} over dense ({reference:.1f} → {statistics.mean(values):.1f})",
            value=statistics.mean(ratios),
            spread=statistics.stdev(ratios) if len(ratios) > 1 else None,
            unit="×",
            target="report",
            reached=None,
            command=COMMAND,
            details={
                "model": model.name,
                "arm": arm,
                "text": text,
                "ppl": values,
                "dense_ppl": reference,
                "seeds": list(SEEDS),
                "calibration_tokens": BLOCK * CALIBRATION_BLOCKS,
                "evaluated_tokens": BLOCK * EVALUATION_BLOCKS,
                "tuned_tokens": TOKENS if arm.startswith("tuned") else 0,
                "tiers": tiers,
            },
        )
