"""What each way of making a model cheaper costs a pretrained chat model, by the commands that are recommended for it.

Each text is cut in two: the first half is calibrated on (a mixture of all texts), the second evaluated on; facts are
asked about the second half of the first text. Nothing is trained. Samples are small, so read ratios, not digits. How
fast a calibrated pruner reads is timed by `prefill_speed`. Runs that are finished in a `--folder` are not repeated.
About an hour and a half on one core for a model of 135 M parameters.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from bench.experiments.runs import claim, halves, once, validated
from bench.tables import figures
from lightning_modules.token_pruning.pruning_file import read as read_pruner
from lightning_modules.token_pruning.quality.measure import proportion
from lightning_modules.token_pruning.schedule import Schedule

RECORDS = "real_model.jsonl"
COMMAND = "python -m bench experiment real_model --model FOLDER --texts NAME=FILE,NAME=FILE"
BLOCK, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 16, 16
STRUCTURED, BLOCKS = "configs/structured_pruning/prune.yaml", "configs/block_sparsity/oneshot.yaml"
CALIBRATE = "configs/token_pruning/calibrate.yaml"
ANSWERS = "configs/token_pruning/answers.yaml"
SPEEDUP, FACTS, NEEDLES, LENGTHS = 2.0, 48, 64, [600, 1200]
SHARES = {"two-four": (0, 1, 0), "three-tiers": (0.35, 0.45, 0.2)}  # of dense, 2:4 and top-k blocks
LAST_ROW_BITS = 9.85  # bits per weight of these three tiers, packed
WHAT = {
    "structured-25": "a quarter of the decoder's parameters removed as whole channels and heads, refitted",
    "two-four": "2:4 in every linear layer, kept weights updated",
    "three-tiers": "three tiers of 16×16 blocks, kept weights updated",
    "mix": f"the mix of dense, 2:4 and top-k blocks that loses least in {LAST_ROW_BITS} bits per weight, as many as "
    "these three tiers take, kept weights updated",
}


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Measure and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a chat model with grouped queries.
        texts: Texts by name; the first should hold 150,000 tokens.

    Raises:
        ValueError: A text too short to be cut in two, or a folder that ``claim`` refuses.
    """
    commit = claim(folder, model, *texts.values(), model=model.name, texts={n: str(p) for n, p in texts.items()})
    options = {name: _data(folder, model, path) for name, path in halves(folder, texts).items()}
    _weights(records, folder, model, options, commit)
    _tokens(records, folder, model, next(iter(options.values())), commit)


def _weights(
    records: Path, folder: Path, model: Path, options: Mapping[str, tuple[str, ...]], commit: str | None
) -> None:
    """What pruned weights cost in perplexity on every text."""
    first, *others = options
    pruned = {arm: folder / arm / "model" for arm in WHAT}
    structured = ("--model.base", str(model), "--model.output", str(pruned["structured-25"]))
    calibration = ("--model.calibration_blocks", str(CALIBRATION_BLOCKS))
    # prune measures the text that it is given; its record has the perplexities
    done = once(folder / "structured-25/prune", "prune", STRUCTURED, *options[first], *structured, *calibration)
    dense = {first: done["structure"]["ppl_before"]}
    ppl, zeros = {"structured-25": {first: done["val_ppl"]}}, {}
    for arm in WHAT:
        if arm == "structured-25":
            continue
        blocks = ("--model.pretrained", str(model), "--model.output", str(pruned[arm]), *_blocks(arm))
        done = once(folder / arm / "prune", "prune", BLOCKS, *options[first], *blocks, *calibration)
        ppl[arm], zeros[arm] = {first: done["val_ppl"]}, 100 * done["tiers"]["iterations"][-1]["sparsity"]
    for name in others:
        dense[name] = validated(folder / "dense" / name, BLOCKS, *options[name], "--model.pretrained", str(model))
        ppl["structured-25"][name] = validated(folder / "structured-25" / name, STRUCTURED, *options[name], *structured)
        for arm in WHAT:
            if arm != "structured-25":
                place = ("--model.pretrained", str(pruned[arm]))
                ppl[arm][name] = validated(folder / arm / name, BLOCKS, *options[name], *place)
    for arm, what in WHAT.items():
        told = f"{what}, {zeros[arm]:.1f} % of the weights zero" if arm in zeros else what
        for name in options:
            _perplexity(records, model, arm, told, name, dense[name], ppl[arm][name], zeros.get(arm), commit)


def _blocks(arm: str) -> tuple[str, ...]:
    """Options of a way to prune blocks."""
    if arm == "mix":
        return ("--model.target_bits", str(LAST_ROW_BITS), "--model.topk", "auto", "--model.scope", "global")
    kept, mid, topk = SHARES[arm]
    shares = {"iterations": 1, "dense": kept, "mid_2_4": mid, "topk": topk}
    return ("--model.schedule", json.dumps({"class_path": "LinearSchedule", "init_args": shares}))


def _data(folder: Path, model: Path, evaluated: Path) -> tuple[str, ...]:
    files = ("--data", "TextCorpus", "--data.train", str(folder / "calibration.json"), "--data.val", str(evaluated))
    shape = ("--data.block_size", str(BLOCK), "--data.batch_size", "2", "--data.max_val_blocks", str(EVALUATION_BLOCKS))
    return (*files, "--data.tokenizer", str(model), *shape)


def _perplexity(
    records: Path,
    model: Path,
    arm: str,
    what: str,
    text: str,
    before: float,
    after: float,
    zeros: float | None,
    commit: str | None,
) -> None:
    figures.append(
        records,
        figure=f"{arm}-{text}",
        what=f"{what}, nothing trained: perplexity on {text} over the dense model's ({before:.1f} → {after:.1f})",
        value=after / before,
        unit="×",
        target="report",
        reached=None,
        command=COMMAND,
        details={
            "model": model.name,
            "arm": arm,
            "text": text,
            "dense_ppl": before,
            "ppl": after,
            "zeros": zeros,
            "evaluated_tokens": BLOCK * EVALUATION_BLOCKS,
            "calibration_tokens": BLOCK * CALIBRATION_BLOCKS,
            "block_size": BLOCK,
            "measured_at": commit,
        },
    )


def _tokens(records: Path, folder: Path, model: Path, data: tuple[str, ...], commit: str | None) -> None:
    """Which answers to planted facts a calibrated pruner keeps, chance beside it."""
    pruner, cache = folder / "calibrated", ("--model.cache_dir", str(folder / "cache"))
    asked: tuple[str, ...] = (
        "--model.base",
        str(model),
        "--model.output",
        str(pruner),
        "--model.speedup",
        str(SPEEDUP),
    )
    asked += ("--model.facts", str(FACTS), "--model.lengths", str(LENGTHS), *cache)
    needed = once(folder / "calibrate", "calibrate", CALIBRATE, *data, *asked)["calibration"]["needed"]
    schedule = read_pruner(pruner)[1]
    recipe = f"calibrated for {SPEEDUP:g}× (after layers {schedule.layers}, keep {schedule.keep})"
    details = {"model": model.name, "measured_at": commit, "schedule": schedule.arguments()}

    best = min(needed, key=lambda layer: layer["share"])
    figures.append(
        records,
        figure="needed",
        what="share of the context that must stay for 95 % of the planted answers to stay, by the heads that look them "
        f"up best, of layer {best['layer']} (by all of its heads {100 * best['all_heads']:.0f} %)",
        value=100 * best["share"],
        unit="%",
        target="report",
        reached=None,
        command=COMMAND,
        details={**details, "needed": needed},
    )
    random = {"class_path": f"{Schedule.__module__}.{Schedule.__name__}", "init_args": schedule.arguments()}
    questions: tuple[str, ...] = (
        "--model.base",
        str(model),
        "--model.windows",
        str(NEEDLES),
        "--model.lengths",
        str(LENGTHS),
    )
    questions += ("--model.pruners", json.dumps([str(pruner)]), "--model.schedules", json.dumps([random]))
    questions += ("--model.scorers", json.dumps([{"class_path": "Random"}]), "--model.peers", "[]")
    questions += ("--model.known_only", "true", "--model.answers", str(folder / "answers.jsonl"))
    rows = once(folder / "needles", "verify", ANSWERS, *data, *questions)["token_quality"]
    known = rows[0]["whole_right"]
    for row in rows[1:]:
        _, low, high = proportion(round(row["kept_right"] * known), known)
        figures.append(
            records,
            figure="needles-calibrated" if row["scorer"] == pruner.name else f"needles-{row['scorer']}",
            what=f"of {known} right answers of the unpruned model to {rows[0]['samples']} facts planted in prompts of "
            f"up to {LENGTHS[-1]:,} tokens, those that stay right; {recipe}, "
            + ("its heads" if row["scorer"] == pruner.name else "tokens kept by chance"),
            value=100 * row["kept_right"],
            spread=50 * (high - low),
            unit="%",
            target="report",
            reached=None,
            command=COMMAND,
            details={**details, **row},
        )
