"""The same prompts put to a model whole and pruned: which answers stay right.

Each answer is appended to a file as it comes, and is not asked for again: a killed run goes on, another arm or more
prompts cost only what is new.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from common.progress import stage
from common.records import record
from common.tables import Table, percent
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.quality.answers import Answer, answer_in_full, is_right
from lightning_modules.token_pruning.quality.arms import GUESSES, Candidate
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.measure import proportion

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Borders of the depths that are told apart in the map."""


class Answers:
    """Answers that are there already, and the file that new ones are appended to.

    Args:
        path: The file, JSON lines; made when it is missing.
        model: The model that answers; answers of others are not taken for its own.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, path: Path, model: Any, max_new_tokens: int) -> None:
        self.path, self.max_new_tokens = path, max_new_tokens
        self._model = _digest(identity_of(model))
        lines, broken = record.read(path) if path.is_file() else ([], [])
        if broken:
            rank_zero_info(record.passed_over(path, broken) + "; what they held is asked again")
        self._known = {line["key"]: Answer(line["said"], line["cached"]) for line in lines if "key" in line}

    def of(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, asked: Asked, arm: Candidate, whole: str = ""
    ) -> Answer:
        """What the model says to a prompt, asked now unless it was before.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            asked: The prompt.
            arm: How it is read.
            whole: What the unpruned model says to it; oracles look at that.
        """
        key = _digest([self._model, asked.ids.tolist(), self.max_new_tokens, arm.identity])
        if key not in self._known:
            arm.look(model, tokenizer, asked, whole)
            found = answer_in_full(model, tokenizer, asked, arm.pruner, self.max_new_tokens)
            line: dict[str, Any] = {"key": key, "scorer": arm.scorer, "schedule": arm.schedule}
            line |= {"kind": asked.kind, "tokens": len(asked.ids), "depth": asked.depth, "answer": asked.answer}
            said = {"said": found.text, "right": is_right(asked, found.text), "cached": found.cached}
            record.append(self.path, line | said)
            self._known[key] = found
        return self._known[key]


class Result(NamedTuple):
    """What one arm said to one prompt.

    Attributes:
        asked: The prompt.
        right: Whether the answer was.
        whole_right: Whether the unpruned model's was.
        cached: Cache entries of the prompt, as a share of the unpruned model's.
        bound: Greatest possible speed-up of its prefill.
        guessed: Whether the unpruned model's answer is right without the sentence that tells it; None where it was not
            asked so.
    """

    asked: Asked
    right: bool
    whole_right: bool
    cached: float
    bound: float
    guessed: bool | None = None


def compare(
    task: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    lengths: Sequence[int],
    arms: Sequence[Candidate],
    answers: Answers,
    known_only: bool = False,
) -> list[dict[str, Any]]:
    """Put every prompt to every arm, one at a time.

    Args:
        task: Its name in the rows.
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompts: What is asked.
        lengths: Longest prompts of each class in the map.
        arms: The first is the unpruned model; ``GUESSES`` comes next where it is among them.
        answers: Where they are kept.
        known_only: Put what the unpruned model answers wrongly to no other arm: nothing can be kept of it.

    Returns:
        A row for every arm that was asked, see `summarise`.
    """
    cost = Cost.of(model)
    results: list[list[Result]] = [[] for _ in arms]
    with stage(f"Task {task}", len(prompts) * len(arms), "answers") as show:
        for number, asked in enumerate(prompts):
            whole, guessed, said = False, None, ""
            for place, arm in enumerate(arms):
                prompt = arm.reads(asked)
                if prompt is None or (known_only and place and not whole):
                    continue
                found = answers.of(model, tokenizer, prompt, arm, said)
                right = is_right(asked, found.text)
                whole, said = (whole, said) if place else (right, found.text)
                guessed = right if arm == GUESSES else guessed
                bound = arm.bound(cost, len(asked.ids))
                results[place].append(Result(asked, right, whole, found.cached, bound, guessed))
                show(number * len(arms) + place + 1)
    if not all(results):
        rank_zero_info(
            f"{task}: the unpruned model answers none of {len(prompts)} prompts rightly, so nobody else is asked"
        )
    return [summarise(task, arm, found, lengths) for arm, found in zip(arms, results, strict=True) if found]


def summarise(task: str, arm: Candidate, results: Sequence[Result], lengths: Sequence[int]) -> dict[str, Any]:
    """One row: an arm against the unpruned model, prompt by prompt.

    Returns:
        ``right``: share of right answers; ``kept_right``: of the unpruned model's right answers, those that are right
        still (None where it had none); both with 95 % intervals over prompts. With ``GUESSES`` among the arms,
        ``read_right``: how many of the unpruned model's right answers it does not give without the sentence that tells
        them, and ``kept_read``: of these, those that are right still, with its interval. ``left_out``: see `Candidate`.
        ``bound`` (FLOPs, mean over prompts), ``kv_share``, ``samples``, ``whole_right`` (how many the unpruned model
        had right), ``map``: counts by length and depth, and ``kinds``: counts by kind of question.
    """
    right, low, high = proportion(sum(result.right for result in results), len(results))
    kept = [result.right for result in results if result.whole_right]
    kept_right, kept_low, kept_high = proportion(sum(kept), len(kept)) if kept else (None, None, None)
    read = [result.right for result in results if result.whole_right and result.guessed is False]
    kept_read, read_low, read_high = proportion(sum(read), len(read)) if read else (None, None, None)
    return {
        "task": task,
        "scorer": arm.scorer,
        "keep": arm.keep,
        "tokens": arm.tokens,
        "schedule": arm.schedule,
        "left_out": arm.left_out,
        "oracle": arm.oracle,
        "samples": len(results),
        "right": right,
        "right_low": low,
        "right_high": high,
        "whole_right": len(kept),
        "kept_right": kept_right,
        "kept_right_low": kept_low,
        "kept_right_high": kept_high,
        "read_right": len(read),
        "kept_read": kept_read,
        "kept_read_low": read_low,
        "kept_read_high": read_high,
        "bound": sum(result.bound for result in results) / len(results),
        "kv_share": sum(result.cached for result in results) / len(results),
        "map": _map(results, lengths),
        "kinds": _kinds(results),
    }


def _map(results: Sequence[Result], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Counts of answers by longest prompt and depth (None for all that stand nowhere in their prompts, last); cells
    without a prompt are left out."""
    cells: dict[tuple[int, float | None], list[Result]] = {}
    for result in results:
        length = min((limit for limit in lengths if len(result.asked.ids) <= limit), default=len(result.asked.ids))
        begins = result.asked.depth
        depth = None if begins is None else max(border for border in DEPTHS[:-1] if border <= begins)
        cells.setdefault((length, depth), []).append(result)
    order = sorted(cells, key=lambda cell: (cell[0], 1.0 if cell[1] is None else cell[1]))
    return [{"tokens": length, "depth": depth, **_counts(cells[length, depth])} for length, depth in order]


def _kinds(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    names = sorted({result.asked.kind for result in results})
    return {name: _counts([result for result in results if result.asked.kind == name]) for name in names}


def _counts(results: Sequence[Result]) -> dict[str, int]:
    return {
        "samples": len(results),
        "right": sum(result.right for result in results),
        "whole_right": sum(result.whole_right for result in results),
        "kept_right": sum(result.right and result.whole_right for result in results),
    }


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Rows of a task for people: shares with their intervals, right answers by length and depth, and the schedules."""
    schedules = list(dict.fromkeys(row["schedule"] for row in rows if row["schedule"]))
    names = [[row["scorer"], schedules.index(row["schedule"]) + 1 if row["schedule"] else ""] for row in rows]
    costs = [[f"{row['bound']:.2f} ×", percent(row["kv_share"])] for row in rows]
    of_all = ["asked of these alone" if row["samples"] < rows[0]["samples"] else _share(row, "right") for row in rows]
    shares = _joined(costs, [[right, _share(row, "kept_right")] for right, row in zip(of_all, rows, strict=True)])
    heads = ["scorer", "schedule", "bound", "KV", "right", "of the unpruned's"]
    if any(row["kept_read"] is not None for row in rows):
        heads.append("of those not guessed")
        shares = _joined(shares, [["" if row["kept_read"] is None else _share(row, "kept_read")] for row in rows])
    known = {field: {cell[field] for cell in rows[0]["map"]} - {None} for field in ("tokens", "depth")}
    places = [(field, value) for field, values in known.items() for value in sorted(values)]
    counts = [[_count(row["map"], *place) for place in places] for row in rows]
    cells = [f"≤ {value:,}" if field == "tokens" else f"from {value:.0%}" for field, value in places]
    task, whole = rows[0]["task"], rows[0]["whole_right"]
    title = f"{task}: {rows[0]['samples']} prompts, {whole} answered rightly by the unpruned model"
    return [
        Table(heads, _joined(names, shares), title),
        Table(["scorer", "schedule", *cells], _joined(names, counts), f"{task}: right answers by tokens, and by depth"),
        Table(["schedule", ""], [[number, words] for number, words in enumerate(schedules, 1)]),
    ]


def _joined(left: list[list[Any]], right: list[list[Any]]) -> list[list[Any]]:
    return [[*a, *b] for a, b in zip(left, right, strict=True)]


def _share(row: dict[str, Any], field: str) -> str:
    if row[field] is None:
        return "none was right"
    return f"{100 * row[field]:.0f} % [{100 * row[field + '_low']:.0f}, {100 * row[field + '_high']:.0f}]"


def _count(cells: list[dict[str, Any]], field: str, value: Any) -> str:
    found = [cell for cell in cells if cell[field] == value]
    return f"{sum(cell['right'] for cell in found)}/{sum(cell['samples'] for cell in found)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
