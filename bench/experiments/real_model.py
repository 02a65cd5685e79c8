"""What each way of making a model cheaper costs today on a pretrained chat model, beside the dense model.

Small samples, so read ratios, not digits. Each text is cut in two: the first half is calibrated on (a mixture of all
texts), the second evaluated on. Nothing is trained. Runs that are finished in a `--folder` are not repeated.

The records of this repository are of one model: figures of another go to a file of their own (`--records`).
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.experiments.runs import claim, halves, once, validated
from bench.tables import figures
from common.records import record
from lightning_modules.loading import load_tokenizer
from lightning_modules.token_pruning.quality.tasks import longbench_windows

RECORDS = "real_model.jsonl"
COMMAND = "python -m bench experiment real_model --model FOLDER --texts NAME=FILE,NAME=FILE"
BLOCK, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 4, 16
STRUCTURED, BLOCKS = "configs/structured_pruning/prune.yaml", "configs/block_sparsity/oneshot.yaml"
QUALITY = "configs/token_pruning/quality.yaml"
SCHEDULE: dict[str, Any] = {"layers": [4, 7, 10], "keep": 0.7}
LENGTH, REPEATS = 1024, 5
LONGEST_PROMPT = 4096
WHAT = {
    "structured-25": "a quarter of the decoder's parameters removed as whole heads and channels",
    "two-four": "2:4 in every linear layer, half of the weights zero",
    "three-tiers": "three tiers of 16×16 blocks, 41.7 % of the weights zero",
}
# facts that a passage of a text does not hold, and how to ask for each
NEEDLES = [
    ("The password of the harbour office is marigold.", "What is the password of the harbour office?", "marigold"),
    ("The code of the blue safe is 7294.", "What is the code of the blue safe?", "7294"),
    ("The dog of the lighthouse keeper is called Bramble.", "What is the lighthouse keeper's dog called?", "Bramble"),
    ("The night train to Lisbon leaves from platform 12.", "From which platform does it leave?", "platform 12"),
    ("The secret ingredient of the soup is tarragon.", "What is the secret ingredient of the soup?", "tarragon"),
    ("The key to the attic lies under the copper kettle.", "Where is the key?", "under the copper kettle"),
]
DEPTHS = (0.25, 0.6)


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Measure and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a chat model with grouped queries.
        texts: Texts by name.

    Raises:
        ValueError: A text too short to be cut in two, records of another model, or a folder that ``claim`` refuses.
    """
    _check_records(records, model)
    commit = claim(folder, model, *texts.values(), model=model.name, texts={n: str(p) for n, p in texts.items()})
    held_out = halves(folder, texts)
    options = {name: _data(folder, model, path) for name, path in held_out.items()}
    first, *others = options
    pruned = {arm: folder / arm / "model" for arm in WHAT}
    structured = ("--model.base", str(model), "--model.output", str(pruned["structured-25"]))
    calibration = ("--model.calibration_blocks", str(CALIBRATION_BLOCKS))
    # prune measures the text that it is given; its record has the perplexities
    done = once(folder / "structured-25/prune", "prune", STRUCTURED, *options[first], *structured, *calibration)
    dense = {first: done["structure"]["ppl_before"]}
    ppl = {"structured-25": {first: done["val_ppl"]}}
    for arm, (kept, mid, topk) in {"two-four": (0, 1, 0), "three-tiers": (0.35, 0.45, 0.2)}.items():
        shares = {"iterations": 1, "dense": kept, "mid_2_4": mid, "topk": topk}
        schedule = ("--model.schedule", json.dumps({"class_path": "LinearSchedule", "init_args": shares}))
        blocks = ("--model.pretrained", str(model), "--model.output", str(pruned[arm]))
        done = once(folder / arm / "prune", "prune", BLOCKS, *options[first], *blocks, *calibration, *schedule)
        ppl[arm] = {first: done["val_ppl"]}
    for name in others:
        dense[name] = validated(folder / "dense" / name, BLOCKS, *options[name], "--model.pretrained", str(model))
        ppl["structured-25"][name] = validated(folder / "structured-25" / name, STRUCTURED, *options[name], *structured)
        for arm in ("two-four", "three-tiers"):
            place = ("--model.pretrained", str(pruned[arm]))
            ppl[arm][name] = validated(folder / arm / name, BLOCKS, *options[name], *place)
    for arm, what in WHAT.items():
        for name in options:
            _perplexity(records, model, arm, what, name, dense[name], ppl[arm][name], commit)
    _tokens(records, folder, model, options[first], held_out[first], commit)


def _check_records(records: Path, model: Path) -> None:
    """Refuse a file with figures of another model: the newest of a name stands, so these would stand for those."""
    found = record.read(records)[0] if records.exists() else []
    others = {name for one in found if (name := one.get("details", {}).get("model")) not in (None, model.name)}
    if others:
        raise ValueError(
            f"{records} has figures of {', '.join(sorted(others))}, and these would be of {model.name}: give another "
            "file (--records runs/mine.jsonl)"
        )


def _data(folder: Path, model: Path, evaluated: Path) -> tuple[str, ...]:
    files = ("--data", "TextCorpus", "--data.train", str(folder / "calibration.json"), "--data.val", str(evaluated))
    shape = ("--data.block_size", str(BLOCK), "--data.batch_size", "2", "--data.max_val_blocks", str(EVALUATION_BLOCKS))
    return (*files, "--data.tokenizer", str(model), *shape)


def _perplexity(
    records: Path, model: Path, arm: str, what: str, text: str, before: float, after: float, commit: str | None
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
            "evaluated_tokens": BLOCK * EVALUATION_BLOCKS,
            "calibration_tokens": BLOCK * CALIBRATION_BLOCKS,
            "block_size": BLOCK,
            "measured_at": commit,
        },
    )


def _tokens(records: Path, folder: Path, model: Path, data: tuple[str, ...], text: Path, commit: str | None) -> None:
    """Speed of pruned prefill with a scorer that is not trained, and which tokens of planted answers are left."""
    timed = {
        "class_path": "PrefillTiming",
        "init_args": {
            "scorer": {"class_path": "LastWindow"},
            "schedule": {"class_path": "lightning_modules.token_pruning.schedule.Schedule", "init_args": SCHEDULE},
            "lengths": [LENGTH],
            "repeats": REPEATS,
            "warmup": 1,
        },
    }
    arguments = (*data, "--model.pretrained", str(model), "--trainer.limit_val_batches", "1")
    done = once(folder / "prefill", "validate", BLOCKS, *arguments, "--trainer.callbacks+", json.dumps(timed))
    arm = next(arm for arm in done["prefill"]["arms"] if arm["arm"] == "pruned")
    recipe = f"`LastWindow`, after layers {SCHEDULE['layers']}, keep {SCHEDULE['keep']} each"
    figures.append(
        records,
        figure=f"prefill-{LENGTH}",
        what=f"prefill of {LENGTH:,} tokens, {recipe}: speed-up (bound by FLOPs {arm['bound']:.2f}×)",
        value=arm["speedup"],
        spread=arm["speedup_spread"],
        unit="×",
        target="report",
        reached=None,
        command=COMMAND,
        details={"model": model.name, "measured_at": commit, **arm},
    )
    needles = folder / "needles.json"
    samples = _needles(json.loads(text.read_text())[0]["text"])
    needles.write_text(json.dumps(samples))
    length = _median_length(needles, load_tokenizer(model))
    asked = ["--model.tasks", '["longbench"]', "--model.longbench", str(needles), "--model.windows", str(len(samples))]
    asked += ["--model.max_prompt", str(LONGEST_PROMPT)]
    asked += ["--model.keep", json.dumps([SCHEDULE["keep"]])]
    scorers = json.dumps([{"class_path": "LastWindow"}, {"class_path": "Random"}])
    schedule = ("--model.schedule.init_args.layers", json.dumps(SCHEDULE["layers"]))
    arguments = (*data, "--model.base", str(model), *asked, "--model.scorers", scorers, *schedule)
    rows = once(folder / "needles", "verify", QUALITY, *arguments)["token_quality"]
    whole = next(row for row in rows if row["keep"] is None)
    for row in rows:
        if row["keep"] is None:
            continue
        figures.append(
            records,
            figure=f"needles-{row['scorer']}",
            what=f"tokens of {len(samples)} answers planted in prompts of {length} tokens (median) that the pruned "
            f"model ranks first, of those that the unpruned one does ({100 * whole['accuracy']:.0f} %); "
            f"`{row['scorer']}`, the same schedule",
            value=100 * row["accuracy"] / whole["accuracy"],
            # half of its 95 % interval; that of the unpruned model, which is the same in all rows, is not in it
            spread=100 * (row["accuracy_high"] - row["accuracy_low"]) / 2 / whole["accuracy"],
            unit="%",
            target="report",
            reached=None,
            command=COMMAND,
            details={"model": model.name, "measured_at": commit, "prompt_tokens": length, "unpruned": whole, **row},
        )


def _median_length(samples: Path, tokenizer: Any) -> int:
    """Tokens of a prompt, as the task makes it of a sample."""
    windows = longbench_windows(samples, tokenizer, LONGEST_PROMPT)
    return round(statistics.median(window.prompt.shape[1] for window in windows))


def _needles(text: str) -> list[dict[str, Any]]:
    """Each fact at each depth of a passage, as LongBench writes its samples."""
    sentences = text[:2800].split(". ")
    samples = []
    for fact, question, answer in NEEDLES:
        for depth in DEPTHS:
            place = int(depth * len(sentences))
            context = ". ".join([*sentences[:place], fact.rstrip("."), *sentences[place:]])
            samples.append({"context": context, "input": f"{question} Answer:", "answers": [answer]})
    return samples
