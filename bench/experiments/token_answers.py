"""What pruned prefill keeps of a chat model's answers, calibrated on one text and asked on others.

Schedules are calibrated for several speed-ups on the first text. On the second, facts are planted and asked for, some
of kinds that calibration does not know, then facts among others of their kind, and questions that the text answers
itself; every arm of a task gets the same prompts. Beside the calibrated arms stand random scores, an oracle, the same
schedule read by all heads (`LastWindow` as it is), and published methods at the share of the cache that the first arm
leaves. The loss of plain text is measured on the third, a text of another kind. No two texts may share a
document. Figures are appended as a task is finished; killed, the experiment goes on where it was.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from bench.experiments.runs import claim, run_main, say
from bench.tables import figures
from common.records import record
from lightning_modules.data.readers import document_text, read_records
from lightning_modules.token_pruning.pruning_file import read
from lightning_modules.token_pruning.quality.measure import proportion
from lightning_modules.token_pruning.quality.planted import FACTS
from lightning_modules.token_pruning.schedule import Schedule

RECORDS = "token_answers.jsonl"
COMMAND = "python -m bench experiment token_answers --model FOLDER --texts calibration=FILE,asked=FILE,other=FILE"
CONFIGS = "configs/token_pruning"
PLAIN = (1.7, 2.0, 2.5)  # speed-ups at which plain text is read
COMPARED = (2.0, 3.5)  # those whose schedules other scorers take too; the first is the peers' too
LENGTHS = [600, 1200, 2400, 3000]  # of what is asked; calibrated on the first two, which takes a third of the time
CALIBRATED_ON = 48  # facts
WINDOWS = 64  # of plain text
# share of the right answers to keep, and of the loss to rise by, in %
KEPT = {
    "needles-calibrated-2": 0.95,
    "needles-calibrated-2.5": 0.90,
    "needles-random-calibrated-2": -0.40,
    "questions-calibrated-2": 0.95,
}
RISE = {"suffix-calibrated-1.7": 2.0}
_CALIBRATED = "calibrated-"
_LEFT_OUT = {"told": "the sentence that tells them", "beside": "another sentence as long"}
_GIVEN = {"SaliencyOracle": {"target": {"class_path": "FutureAttention"}}}  # a gradient takes several times that
_PROTECTED = 0.03  # of the tokens stays whatever its score
Row = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    """What is asked, how often, and by which arms.

    Attributes:
        kind: Task of `TokenQuality`.
        prompts: How many.
        speedups: Of the calibrated arms.
        peers: Published methods by name; all where None.
        scorers: What else takes the calibrated schedules.
        distractors: See `TokenQuality`.
        controls: See `TokenQuality`.
    """

    kind: str
    prompts: int
    speedups: tuple[float, ...]
    peers: tuple[str, ...] | None = None
    scorers: tuple[str, ...] = ("LastWindow", "Random")
    distractors: int = 0
    controls: bool = False


TASKS = {
    "needles": _Task("needles", 104, (2.0, 2.5), ("SnapKV",), ("Random", "SaliencyOracle")),
    "needles-more": _Task("needles", 104, (2.0, 3.0, 3.5)),
    "needles-among-others": _Task("needles", 48, (2.0, 2.5), (), distractors=2),
    "questions": _Task("questions", 200, (2.0, 2.5), ("SnapKV",), controls=True),
}


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Calibrate, ask, and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a chat model.
        texts: "calibration" (JSON, about 250,000 tokens), "asked" (JSON, fiction or articles, a million) and "other".

    Raises:
        ValueError: A text is missing or shares a document with another, or a folder that ``claim`` refuses.
    """
    missing = [name for name in ("calibration", "asked", "other") if name not in texts]
    if missing:
        raise ValueError(f"texts: {', '.join(missing)} missing; {COMMAND}")
    _check_apart(texts)
    commit = claim(folder, model, *texts.values(), model=model.name, texts={n: str(p) for n, p in texts.items()})
    cache = ("--data.cache_dir", str(folder / "cache"))
    for name, task in TASKS.items():
        for speedup in task.speedups:
            _calibrated(folder, model, texts, speedup)
        _answers(records, model, name, _asked(folder, model, texts, name, task, cache), commit)
    for speedup in PLAIN:
        _calibrated(folder, model, texts, speedup)
    _loss(records, model, _suffixes(folder, model, texts, cache), commit)


def _check_apart(texts: Mapping[str, Path]) -> None:
    found = {
        name: {document_text(one, where).strip() for one, where, _ in read_records([path])}
        for name, path in texts.items()
    }
    for one, other in itertools.combinations(found, 2):
        if shared := found[one] & found[other]:
            raise ValueError(
                f"texts: {one} and {other} share {len(shared)} documents: what is tuned on would be tested on"
            )


def _folder(folder: Path, speedup: float) -> Path:
    return folder / f"{_CALIBRATED}{speedup:g}"


def _calibrated(folder: Path, model: Path, texts: Mapping[str, Path], speedup: float) -> None:
    if _folder(folder, speedup).exists():
        return
    say(f"calibrating for {speedup:g}×")
    arguments = ["--model.base", str(model), "--model.output", str(_folder(folder, speedup))]
    arguments += ["--model.speedup", str(speedup), "--model.facts", str(CALIBRATED_ON)]
    arguments += ["--model.lengths", str(LENGTHS[:2]), "--model.cache_dir", str(folder / "cache")]
    # with a validation text given, all of the other is there to plant facts in
    arguments += ["--data", "TextCorpus", "--data.train", str(texts["calibration"]), "--data.val", str(texts["other"])]
    arguments += ["--data.tokenizer", str(model)]
    run_main(folder / f"calibrate-{speedup:g}", "calibrate", f"{CONFIGS}/calibrate.yaml", *arguments)


def _asked(
    folder: Path, model: Path, texts: Mapping[str, Path], name: str, task: _Task, cache: tuple[str, ...]
) -> list[Row]:
    """Rows of all arms; answers that are there are not asked for again."""
    compared = [_schedule(folder, speedup) for speedup in COMPARED if speedup in task.speedups]
    arguments = ["--model.base", str(model), "--model.tasks", f"[{task.kind}]", "--model.windows", str(task.prompts)]
    arguments += ["--model.pruners", json.dumps([str(_folder(folder, speedup)) for speedup in task.speedups])]
    arguments += ["--model.schedules", json.dumps(list(map(_configured, compared)))]
    scorers = [{"class_path": name, "init_args": _GIVEN.get(name, {})} for name in task.scorers]
    arguments += ["--model.scorers", json.dumps(scorers)]
    arguments += ["--model.peers", json.dumps(_peers(model, compared[0], task.peers))]
    arguments += ["--model.distractors", str(task.distractors), "--model.lengths", str(LENGTHS)]
    arguments += ["--model.controls", str(task.controls).lower()]
    arguments += ["--model.known_only", "true", "--model.answers", str(folder / "answers.jsonl"), *cache]
    arguments += ["--data.train", str(texts["calibration"]), "--data.val", str(texts["asked"])]
    arguments += ["--data.tokenizer", str(model)]
    return _rows(folder / name, f"{CONFIGS}/answers.yaml", arguments)


def _peers(model: Path, schedule: Schedule, names: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """Published methods, tuned alike: of the cache, at the share that the schedule leaves; of tokens, at its speed-up.

    Those that read one layer read the first that calibration found. LLMLingua reads the whole prompt first, for want of
    a smaller model.
    """
    share, layers = round(_cache_share(model, schedule), 3), AutoConfig.from_pretrained(str(model)).num_hidden_layers
    read = min(schedule.layers or [0]) + 1  # what `calibrate` writes names its layers
    later = (layers / COMPARED[0] - read) / (layers - read)  # of the tokens, where later layers read them
    again = 1 / COMPARED[0] - read / layers  # where all layers do
    cache = {
        "class_path": "SnapKV",
        "init_args": {"keep": share, "window": 8, "kernel": 7},
    }  # FastKV's own but for keep
    arguments_of: dict[str, dict[str, Any]] = {
        "SnapKV": {"keep": share},
        "ExpectedAttention": {"keep": share},
        "RandomCache": {"keep": share},
        "FastKV": {"layer": read - 1, "keep": _left(later), "tail": 0.0, "cache": cache},
        "LLMLingua": {"keep": 0.5},
        "GemFilter": {"layer": read - 1, "keep": _left(again), "tail": 0.0},
    }
    return [
        {"class_path": name, "init_args": given}
        for name, given in arguments_of.items()
        if names is None or name in names
    ]


def _left(share: float) -> float:
    """Of what may be dropped; where so deep a layer leaves nothing for the speed-up, a hundredth."""
    return max(0.01, round(share - _PROTECTED, 3))


def _schedule(folder: Path, speedup: float) -> Schedule:
    return read(_folder(folder, speedup))[1]


def _configured(schedule: Schedule) -> dict[str, Any]:
    return {"class_path": f"{Schedule.__module__}.{Schedule.__name__}", "init_args": schedule.arguments()}


def _cache_share(model: Path, schedule: Schedule) -> float:
    """Cache entries that a schedule leaves, as a share of the unpruned model's; mean over the lengths."""
    layers = AutoConfig.from_pretrained(str(model)).num_hidden_layers
    return sum(sum(schedule.lengths(n, layers)) / (n * layers) for n in LENGTHS) / len(LENGTHS)


def _suffixes(folder: Path, model: Path, texts: Mapping[str, Path], cache: tuple[str, ...]) -> list[Row]:
    arguments = ["--model.base", str(model), "--model.tasks", "[suffix]", "--model.windows", str(WINDOWS)]
    arguments += ["--model.pruners", json.dumps([str(_folder(folder, speedup)) for speedup in PLAIN])]
    arguments += ["--model.schedules", json.dumps([_configured(_schedule(folder, COMPARED[0]))])]
    arguments += ["--model.scorers", json.dumps([{"class_path": "Random"}, {"class_path": "Recency"}])]
    arguments += ["--model.peers", "[]", *cache, "--data.train", str(texts["calibration"])]
    arguments += ["--data.val", str(texts["other"]), "--data.tokenizer", str(model)]
    arguments += ["--data.block_size", "1024", "--data.batch_size", "1", "--data.max_val_blocks", str(WINDOWS)]
    return _rows(folder / "suffix", f"{CONFIGS}/answers.yaml", arguments)


def _rows(folder: Path, config: str, arguments: list[str]) -> list[Row]:
    """What `verify` leaves in the record; run unless it was."""
    left = folder / "runs/results.jsonl"
    if not left.is_file():
        run_main(folder, "verify", config, *arguments)
    rows: list[Row] = record.read(left)[0][-1]["token_quality"]
    return rows


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """The calibrated arm of every schedule in words."""
    return {row["schedule"]: row["scorer"] for row in rows if row["scorer"].startswith(_CALIBRATED)}


def _arm(row: Row, names: Mapping[str, str]) -> str:
    """An arm's name, with the schedule's where it is another's."""
    if row["scorer"].startswith(_CALIBRATED):  # two speed-ups may have found the same schedule
        return str(row["scorer"])
    other = names.get(row["schedule"])
    return row["scorer"] if other in (None, row["scorer"]) else f"{row['scorer']}-{other}"


def _answers(records: Path, model: Path, task: str, rows: Sequence[Row], commit: str | None) -> None:
    """Of the unpruned model's right answers, those that each arm keeps; of calibrated ones, by kinds too."""
    names = _names(rows)
    for row in rows[1:]:
        arm = _arm(row, names)
        details = {**row, "model": model.name, "measured_at": commit, "task": task, "arm": arm}
        _kept(records, f"{task}-{arm}", f"{task}: ", row["whole_right"], row["kept_right"], details)
        if row["kept_read"] is not None and row["left_out"] != "told":
            details = {**details, "task": f"{task}, not guessed"}
            what = f"{task}, without those that it guesses: "
            _kept(records, f"{task}-read-{arm}", what, row["read_right"], row["kept_read"], details)
        unseen = [count for kind, count in row["kinds"].items() if kind in FACTS and FACTS[kind].held_out]
        if row["scorer"].startswith(_CALIBRATED) and unseen:
            whole, kept = (sum(count[field] for count in unseen) for field in ("whole_right", "kept_right"))
            details = {**details, "task": f"{task}, unseen kinds"}
            what = f"{task}, kinds that calibration does not know: "
            _kept(records, f"{task}-unseen-{arm}", what, whole, kept / max(whole, 1), details)


def _kept(records: Path, figure: str, what: str, whole: int, share: float, details: Row) -> None:
    scorer, wanted = details["scorer"], KEPT.get(figure)
    _, low, high = proportion(round(share * whole), max(whole, 1))
    keeps = f"those that `{scorer}` keeps (bound {details['bound']:.2f}×, cache {100 * details['kv_share']:.0f} %)"
    if details.get("left_out"):
        keeps = f"those that it gives without {_LEFT_OUT[details['left_out']]}, too"
    reached = None
    if wanted is not None:
        asked = float(scorer.removeprefix(_CALIBRATED)) if scorer.startswith(_CALIBRATED) else 0.0
        reached = share >= wanted and details["bound"] >= asked if wanted > 0 else share <= -wanted
    figures.append(
        records,
        figure=figure,
        what=f"{what}of {whole} right answers of the unpruned model, {keeps}",
        value=100 * share,
        spread=50 * (high - low),
        unit="%",
        target="report" if wanted is None else f"{'≥' if wanted > 0 else '≤'} {100 * abs(wanted):.0f} %",
        reached=reached,
        command=COMMAND,
        details={**details, "low": 100 * low, "high": 100 * high},
    )


def _loss(records: Path, model: Path, rows: Sequence[Row], commit: str | None) -> None:
    """What each arm costs on plain text."""
    names = _names(rows)
    for row in rows[1:]:
        figure = f"suffix-{_arm(row, names)}"
        rise, most = 100 * row["nll_rise"] / rows[0]["nll"], RISE.get(figure)
        figures.append(
            records,
            figure=figure,
            what=f"loss of the last 64 of 1,024 tokens of another text, `{row['scorer']}`: rise over unpruned",
            value=rise,
            spread=50 * (row["nll_rise_high"] - row["nll_rise_low"]) / rows[0]["nll"],
            unit="%",
            target="report" if most is None else f"≤ {most:g} %",
            reached=None if most is None else rise <= most,
            command=COMMAND,
            details={"model": model.name, "measured_at": commit, **row},
        )
