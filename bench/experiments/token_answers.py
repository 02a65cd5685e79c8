"""What pruned prefill keeps of a chat model's answers, calibrated on one text and asked on others.

Schedules are calibrated for several speed-ups on the first text. On the second, facts are planted and asked for, and
questions that it answers itself; every arm gets the same prompts. Beside the calibrated arms stand random scores and
the same schedule read by all heads, and published methods at the share of the cache that the first arm leaves. The loss
of plain text is measured on the third, a text of another kind. Killed, it goes on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from bench.experiments.runs import claim, run_main, say
from bench.tables import figures
from common.records import record
from lightning_modules.token_pruning.pruning_file import read
from lightning_modules.token_pruning.schedule import Schedule

RECORDS = "token_answers.jsonl"
COMMAND = "python -m bench experiment token_answers --model FOLDER --texts calibration=FILE,asked=FILE,other=FILE"
CONFIGS = "configs/token_pruning"
SPEEDUPS, COMPARED = (2.0, 2.5, 3.0, 3.5), (2.0, 3.5)  # asked for; and those whose schedules other scorers take too
LENGTHS = [600, 1200, 2400, 3000]
NEEDLES, QUESTIONS, WINDOWS = 120, 220, 128
KEPT = {"calibrated-2": 0.95, "calibrated-2.5": 0.90}  # share of the right answers to keep
_CALIBRATED = "calibrated-"
Row = dict[str, Any]


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Calibrate, ask, and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a chat model.
        texts: "calibration" (JSON, about 250,000 tokens), "asked" (JSON, fiction or articles, a million) and "other".

    Raises:
        ValueError: A text is missing, or a folder that ``claim`` refuses.
    """
    missing = [name for name in ("calibration", "asked", "other") if name not in texts]
    if missing:
        raise ValueError(f"texts: {', '.join(missing)} missing; {COMMAND}")
    commit = claim(folder, model, *texts.values(), model=model.name)
    cache = ("--data.cache_dir", str(folder / "cache"))
    for speedup in SPEEDUPS:
        _calibrated(folder, model, texts["calibration"], speedup)
    for task, windows in (("needles", NEEDLES), ("questions", QUESTIONS)):
        _answers(records, model, task, _asked(folder, model, texts, task, windows, cache), commit)
    _loss(records, model, _suffixes(folder, model, texts, cache), commit)


def _folder(folder: Path, speedup: float) -> Path:
    return folder / f"{_CALIBRATED}{speedup:g}"


def _calibrated(folder: Path, model: Path, text: Path, speedup: float) -> None:
    if _folder(folder, speedup).exists():
        return
    say(f"calibrating for {speedup:g}×")
    arguments = ["--model.base", str(model), "--model.output", str(_folder(folder, speedup))]
    arguments += ["--model.speedup", str(speedup), "--model.lengths", str(LENGTHS[:3])]
    arguments += ["--model.cache_dir", str(folder / "cache")]
    arguments += ["--data", "TextCorpus", "--data.train", str(text), "--data.tokenizer", str(model)]
    run_main(folder / f"calibrate-{speedup:g}", "calibrate", f"{CONFIGS}/calibrate.yaml", *arguments)


def _asked(
    folder: Path, model: Path, texts: Mapping[str, Path], task: str, windows: int, cache: tuple[str, ...]
) -> list[Row]:
    """Rows of all arms; answers that are there are not asked for again."""
    schedules = [_schedule(folder, speedup) for speedup in COMPARED]
    share = round(_cache_share(model, schedules[0]), 3)
    arguments_of = {"SnapKV": {"keep": share}, "ExpectedAttention": {"keep": share}, "RandomCache": {"keep": share}}
    # those that read less: at about the bound of the first speed-up
    middle = AutoConfig.from_pretrained(str(model)).num_hidden_layers // 2
    arguments_of |= {"FastKV": {"layer": middle - 4, "keep": 0.1}, "LLMLingua": {"keep": 0.5}}
    arguments_of |= {"GemFilter": {"layer": middle - 4, "keep": 0.1}}
    peers: list[Any] = [{"class_path": name, "init_args": given} for name, given in arguments_of.items()]
    arguments = ["--model.base", str(model), "--model.tasks", f"[{task}]", "--model.windows", str(windows)]
    arguments += ["--model.pruners", json.dumps([str(_folder(folder, speedup)) for speedup in SPEEDUPS])]
    arguments += ["--model.schedules", json.dumps(list(map(_configured, schedules)))]
    arguments += ["--model.scorers", json.dumps([{"class_path": "LastWindow"}, {"class_path": "Random"}])]
    arguments += ["--model.peers", json.dumps(peers), "--model.lengths", str(LENGTHS)]
    arguments += ["--model.answers", str(folder / "answers.jsonl"), *cache]
    arguments += ["--data.train", str(texts["calibration"]), "--data.val", str(texts["asked"])]
    arguments += ["--data.tokenizer", str(model)]
    return _rows(folder / task, f"{CONFIGS}/answers.yaml", arguments)


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
    arguments += ["--model.pruners", json.dumps([str(_folder(folder, speedup)) for speedup in SPEEDUPS])]
    arguments += ["--model.schedules", json.dumps([_configured(_schedule(folder, SPEEDUPS[0]))])]
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
    other = names.get(row["schedule"])
    return row["scorer"] if other in (None, row["scorer"]) else f"{row['scorer']}-{other}"


def _answers(records: Path, model: Path, task: str, rows: Sequence[Row], commit: str | None) -> None:
    """Of the unpruned model's right answers, those that each arm keeps."""
    whole, names = rows[0], _names(rows)
    for row in rows[1:]:
        wanted = KEPT.get(row["scorer"])
        kept = f"those that `{row['scorer']}` keeps (bound {row['bound']:.2f}×, cache {100 * row['kv_share']:.0f} %)"
        figures.append(
            records,
            figure=f"{task}-{_arm(row, names)}",
            what=f"{task}: of {whole['whole_right']} right answers of {whole['samples']}, {kept}",
            value=100 * row["kept_right"],
            spread=50 * (row["kept_right_high"] - row["kept_right_low"]),
            unit="%",
            target=f"≥ {100 * wanted:.0f} %" if wanted else "report",
            reached=row["kept_right"] >= wanted and row["bound"] >= float(_arm(row, names)[len(_CALIBRATED) :])
            if wanted
            else None,
            command=COMMAND,
            details={"model": model.name, "measured_at": commit, "task": task, "arm": _arm(row, names), **row},
        )


def _loss(records: Path, model: Path, rows: Sequence[Row], commit: str | None) -> None:
    """What each arm costs on plain text."""
    names = _names(rows)
    for row in rows[1:]:
        figures.append(
            records,
            figure=f"suffix-{_arm(row, names)}",
            what=f"loss of the last 64 of 1,024 tokens of another text, `{row['scorer']}`: rise over unpruned",
            value=100 * row["nll_rise"] / rows[0]["nll"],
            spread=50 * (row["nll_rise_high"] - row["nll_rise_low"]) / rows[0]["nll"],
            unit="%",
            target="report",
            reached=None,
            command=COMMAND,
            details={"model": model.name, "measured_at": commit, "arm": _arm(row, names), **row},
        )
