"""Block sparsity: sparsity of every iteration, and perplexity of the ways to get there at equal fine-tuning tokens."""

import statistics
from pathlib import Path
from typing import Any

from bench.experiments.runs import ROOT, books, fit, say
from bench.tables import figures

RECORDS = "block_sparsity.jsonl"
SEEDS, STEPS_PER_EPOCH, VAL_BLOCKS = (1, 2, 3), 5, 32
CONFIG, SCHEDULE = "configs/block_sparsity/progressive.yaml", "configs/block_sparsity/progressive.csv"
HEADER = "iteration,dense,mid_2_4,topk,dense_to_2_4,mid_2_4_to_topk,epochs"
# one row of a schedule each, as many epochs as the progressive schedule has in all
ONE_ROW = {"oneshot": "1,0.35,0.45,0.20,0.65,0.20,11", "half": "1,0,1,0,1,0,11", "whole": "1,1,0,0,0,0,11"}
UNSTRUCTURED = ("--model.pattern", "unstructured")
PAPERS = ("--model.update", "null")  # masks alone, as Wanda's and magnitude's
ARMS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "dense": ("dense model, fine-tuned alike", "whole", ()),
    "progressive": ("three tiers, progressive (Wanda)", None, ()),
    "oneshot": ("three tiers, one-shot (Wanda)", "oneshot", ()),
    "magnitude-tiers": ("three tiers, one-shot (magnitude)", "oneshot", ("--model.score", "Magnitude")),
    "wanda": ("unstructured, one-shot (Wanda)", "oneshot", UNSTRUCTURED),
    "magnitude": ("unstructured, one-shot (magnitude)", "oneshot", (*UNSTRUCTURED, "--model.score", "Magnitude")),
    "half": ("plain 2:4, one-shot (Wanda), 50 % zeros", "half", ()),
}


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure and append the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in ONE_ROW.items():
        (folder / f"{name}.csv").write_text(f"{HEADER}\n{row}\n")
    command = f"python -m bench experiment block_quality --model {model.name}"
    ppl: dict[str, list[float]] = {arm: [] for arm in ARMS}
    done: dict[str, Any] = {}
    for arm, (_, schedule, options) in ARMS.items():
        for seed in SEEDS:
            path = ROOT / SCHEDULE if schedule is None else folder / f"{schedule}.csv"
            steps = ("--trainer.limit_train_batches", str(STEPS_PER_EPOCH))
            done[arm] = _fit(folder / f"{arm}-{seed}", model, seed, path, *steps, *options)
            ppl[arm].append(done[arm]["val_ppl"])
            say(f"{arm}, seed {seed}: validation perplexity {ppl[arm][-1]:.3f}")
        _perplexity(records, arm, ppl, done[arm], command)
        if arm == "progressive":
            _sparsities(records, done[arm]["tiers"], command)
    _half(records, folder, model, command)


def _fit(folder: Path, model: Path, seed: int, schedule: Path, *more: str, command: str = "fit") -> dict[str, Any]:
    start = ("--model.pretrained", str(model), "--model.schedule.path", str(schedule))
    data = (*books(), *PAPERS, "--data.tokenizer", str(model), "--data.max_val_blocks", str(VAL_BLOCKS))
    data = (*data, "--data.block_size", "256", "--data.batch_size", "4", "--seed_everything", str(seed))
    return fit(folder, CONFIG, *start, *data, *more, command=command).record


def _sparsities(records: Path, tiers: dict[str, Any], command: str) -> None:
    """Zeros after each iteration against 0.5·m + (1 − k/256)·t of the schedule's own shares."""
    asked = [line.split(",") for line in (ROOT / SCHEDULE).read_text().splitlines()[1:]]
    for entry, row in zip(tiers["iterations"], asked, strict=True):
        mid, topk = float(row[2]), float(row[3])
        wanted, found = 50 * mid + 100 * (1 - 10 / 256) * topk, 100 * entry["sparsity"]
        figures.append(
            records,
            figure=f"block-sparsity-{entry['iteration']}",
            what=f"zeros in the decoder's linear layers after iteration {entry['iteration']} "
            f"({100 * entry['model_sparsity']:.1f} % of the whole model)",
            value=found,
            unit="%",
            target=f"{wanted:.1f} ± 0.2 %",
            reached=abs(found - wanted) <= 0.2,
            command=command,
            details=entry,
        )
    violations = sum(entry["violations"] for entry in tiers["iterations"])
    figures.append(
        records,
        figure="block-violations",
        what="mask violations after all epochs of the progressive run, merge, save and load",
        value=violations,
        unit="",
        target="0",
        reached=violations == 0,
        command=command,
    )


def _perplexity(records: Path, arm: str, ppl: dict[str, list[float]], done: dict[str, Any], command: str) -> None:
    """Mean and spread of an arm; the progressive one is judged against the dense model fine-tuned alike."""
    values, zeros = ppl[arm], 100 * done["tiers"]["sparsity"]
    worse = statistics.mean(a / b for a, b in zip(values, ppl["dense"], strict=True))
    judged = arm == "progressive"
    figures.append(
        records,
        figure=f"block-ppl-{arm}",
        what=f"validation perplexity, {ARMS[arm][0]}, {zeros:.1f} % zeros ({worse:.3f} × dense)",
        value=statistics.mean(values),
        spread=figures.spread(values),
        unit="",
        target="≤ 1.10 × dense" if judged else "report",
        reached=worse <= 1.1 if judged else None,
        command=command,
        details={"val_ppl": values, "seeds": list(SEEDS), "steps": 11 * STEPS_PER_EPOCH, "over_dense": worse},
    )


def _half(records: Path, folder: Path, model: Path, command: str) -> None:
    """Wanda and magnitude at 50 % unstructured without any training."""
    found = {}
    for score in ("Wanda", "Magnitude"):
        options = (*UNSTRUCTURED, "--model.score", score)
        run = _fit(folder / f"half-{score}", model, 1, folder / "half.csv", *options, command="prune")
        found[score] = run["val_ppl"]
    figures.append(
        records,
        figure="wanda-over-magnitude",
        what="perplexity of Wanda over that of magnitude, 50 % unstructured per row, no fine-tuning",
        value=found["Wanda"] / found["Magnitude"],
        unit="×",
        target="< 1 ×",
        reached=found["Wanda"] < found["Magnitude"],
        command=command,
        details=found,
    )
