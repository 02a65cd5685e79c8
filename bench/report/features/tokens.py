"""Token pruning: how much faster a prompt is read, against the answers that stay right."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from bench.report.evidence import Evidence, run_name
from bench.report.features.base import Axis, Case, Feature, Point, Speed
from bench.report.values import Record, budget, number, text

_UNPRUNED = ("answer_left_out", "sentence_left_out")
_CONTROLS = ("random", "recency", "stride", "random_cache", *_UNPRUNED)  # what needs no look at the prompt
_NOT_PRUNED = ("baseline", "keep-1.0", "random")  # arms that prefill is timed beside


def _cases(evidence: Evidence) -> list[Case]:
    found: dict[str, list[Point]] = defaultdict(list)
    for one in evidence.figures_of("token_answers"):
        details = one["details"]
        if "arm" in details and (point := _asked(details["arm"], details, one)):
            found[f"{text(details.get('model'))}, {_task(one)} of token_answers"].append(point)
    for one in evidence.figures_of("real_model"):
        details = one["details"]
        if "kept_right" in details and (point := _asked(text(details.get("scorer")), details, one)):
            found[f"{text(details.get('model'))}, {text(details.get('task'))} of real_model"].append(point)
        if isinstance(details.get("unpruned"), Mapping) and (point := _read(details, details["unpruned"], one)):
            found[f"{text(details.get('model'))}, tokens of planted answers"].append(point)
    for run in evidence.runs:
        for task, points in _rows(run).items():
            found[f"{run_name(run)}, {task}"] += points
    return [Case(title, points) for title, points in found.items()]


def _task(figure: Record) -> str:
    """Of which questions a figure is: early ones have it in their name alone, parts of a task in the details alone."""
    named = text(figure["details"].get("task"))
    return named if ", " in named else figure["figure"].removesuffix(f"-{figure['details']['arm']}")


def _rows(run: Record) -> dict[str, list[Point]]:
    """The record's block `token_quality` by task."""
    block = run.get("token_quality")
    rows = [row for row in block if isinstance(row, Mapping)] if isinstance(block, list) else []
    found: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        task = text(row.get("task"))
        whole = next(
            (one for one in rows if one.get("task") == row.get("task") and one.get("scorer") == "unpruned"), {}
        )
        point = _asked(_name(row), row, run) or _read(row, whole, run)
        if point and not row.get("oracle"):
            found[task].append(point)
    return found


def _asked(name: str, row: Mapping[str, Any], source: Record) -> Point | None:
    """Answers given freely: the share of the unpruned model's right ones that stay right."""
    kept, bound = number(row, "kept_right"), number(row, "bound")
    if kept is None or bound is None or row.get("scorer") == "unpruned":
        return None
    low, high = number(row, "kept_right_low"), number(row, "kept_right_high")
    error = (100 * (kept - low), 100 * (high - kept)) if low is not None and high is not None else (0.0, 0.0)
    return Point(name, bound, 100 * kept, error, _is_control(name), (source,), arithmetic=True)


def _read(row: Mapping[str, Any], whole: Mapping[str, Any], source: Record) -> Point | None:
    """Answers read token by token: right tokens as a share of the unpruned model's, and the prefill time measured."""
    right, all_right = number(row, "accuracy"), number(whole, "accuracy")
    pruned, unpruned = number(row, "prefill_ms"), number(row, "prefill_ms_unpruned")
    if row.get("scorer") in ("unpruned", *_UNPRUNED) or right is None or not all_right or not pruned or not unpruned:
        return None
    low, high = (number(row, f"accuracy_{end}") for end in ("low", "high"))
    error = (0.0, 0.0) if low is None or high is None else (right - low, high - right)
    below, above = (100 * one / all_right for one in error)
    name = _name(row)
    return Point(name, unpruned / pruned, 100 * right / all_right, (below, above), _is_control(name), (source,))


def _name(row: Mapping[str, Any]) -> str:
    """The scorer, and what it keeps."""
    return ", ".join(filter(None, (text(row.get("scorer")), budget(row))))


def _is_control(name: str) -> bool:
    return name.partition("-")[0].partition("(")[0].partition(",")[0] in _CONTROLS


def pruned_arms(block: Mapping[str, Any]) -> list[str]:
    """The arms of a record's block `prefill` that prune."""
    schedules, arms = block.get("schedules"), block.get("arms")
    if isinstance(schedules, Mapping):
        return [str(name) for name in schedules]
    rows = [row for row in arms if isinstance(row, Mapping)] if isinstance(arms, list) else []
    return [name for name in dict.fromkeys(str(row.get("arm")) for row in rows) if name not in _NOT_PRUNED]


def _speeds(evidence: Evidence) -> list[Speed]:
    found = []
    for one in [*evidence.figures_of("real_model"), *evidence.figures_of("prefill_speed")]:
        details = one["details"]
        arms = details.get("arms")
        arm = arms.get("pruned") if isinstance(arms, Mapping) else details if details.get("arm") == "pruned" else None
        if arm and (speed := _arm(arm, one)) and speed not in found:
            found.append(speed)
    for run in evidence.runs:
        block = run.get("prefill")
        arms = block.get("arms") if isinstance(block, Mapping) else None
        names = pruned_arms(block) if isinstance(block, Mapping) else []
        pruned = [a for a in arms or [] if isinstance(a, Mapping) and a.get("arm") in names]
        found += [speed for arm in pruned if (speed := _arm(arm, run))]
    return found


def _arm(arm: Mapping[str, Any], source: Record) -> Speed | None:
    length, value = number(arm, "length"), number(arm, "speedup")
    if length is None or value is None:
        return None
    model = text(source.get("model") or source.get("details", {}).get("model") or "a random model")
    preset = "" if arm.get("arm") in (None, "pruned") else f" with {text(arm['arm'])}"
    return Speed(
        f"reading {length:,.0f} tokens{preset} ({model})", model + preset, value, number(arm, "bound"), (source,)
    )


def _said(point: Point) -> str:
    saved = f"With {point.saving:.1f} × less arithmetic in" if point.arithmetic else f"At {point.saving:.1f} ×"
    return f"{saved} prefill {point.quality:.0f} % of the answers stay"


FEATURE = Feature(
    "token_pruning",
    "Token pruning",
    "Fewer tokens of a prompt in the deeper layers.",
    Axis("prefill: times faster, or times less arithmetic where answers are free", "prefill (×)", 1.0),
    Axis("right answers that stay (%)", "answers that stay (%)", 100.0),
    95.0,
    "95 % of the answers",
    _cases,
    _speeds,
    _said,
)
