"""The result of a calculation, by likelihood."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_modules.data.corpus import find_corpus
from lightning_modules.data.readers import read_records
from lightning_modules.evaluation.local.base import CHOICE, LocalTask, shuffled

_NOTES = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"\$?\d[\d,]*(?:\.\d+)?")
_CHOICES = 4


class Gsm8kAnswer(LocalTask):
    """The last number of a GSM8K solution, after the problem and the solution up to there, among four.

    The wrong ones are other numbers of the problem and its solution, and where these are too few, near ones: a model
    that only copies is wrong. GSM8K: arXiv 2110.14168. Asked by likelihood, because a small model's free answers are
    nearly all wrong, and so say nothing of what was lost.

    Args:
        file: JSON lines with ``question`` and ``answer``, whose last line is ``#### RESULT``.
        items: See ``LocalTask``.
        seed: See ``LocalTask``.
        label: See ``LocalTask``.
    """

    chance = 1 / _CHOICES

    def __init__(self, file: str, items: int = 500, seed: int = 0, label: str | None = None) -> None:
        super().__init__(file, items, seed, label)

    def candidates(self) -> Iterator[dict[str, Any]]:
        """See ``LocalTask.candidates``; records without a question, or whose result is no number, are passed over."""
        records = read_records(find_corpus(Path(str(self.file)).expanduser()).files)
        for number, (record, where, _) in enumerate(records):
            if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
                raise ValueError(f"local: {where} has no fields question and answer; give GSM8K's JSON lines")
            solution, _, result = str(record["answer"]).partition("\n#### ")
            solution, result = _NOTES.sub("", solution), result.strip()
            last = next((m for m in reversed(list(_NUMBER.finditer(solution)))), None)
            if last is None or _plain(last[0]) != _plain(result):
                continue
            context = f"Question: {record['question']}\nAnswer: {solution[: last.start()].rstrip()}"
            right, sign = _plain(last[0]), "$" if last[0].startswith("$") else ""
            key = f"{self.seed} {number}"
            wrong = _others(right, f"{record['question']} {solution[: last.start()]}", random.Random(key))
            # all written alike, without commas: how a number is written must not tell which one is right
            yield {"context": context, **shuffled(sign + right, [sign + one for one in wrong], key)}

    def asks(self) -> dict[str, Any]:
        """See ``LocalTask.asks``."""
        return CHOICE

    def _needs(self) -> str:
        return "give GSM8K's JSON lines, " + json.dumps({"question": "…", "answer": "… 7\n#### 7"}, ensure_ascii=False)


def _plain(number: str) -> str:
    return number.replace("$", "").replace(",", "")


def _others(right: str, text: str, rng: random.Random) -> list[str]:
    """Three other numbers, of the text as far as it has any."""
    numbers = {float(right): right}  # one of each value, however often and in whatever way it is written
    for one in sorted(_plain(found) for found in _NUMBER.findall(text)):
        numbers.setdefault(float(one), one)
    found = sorted(one for one in numbers.values() if one != right)
    chosen = rng.sample(found, min(len(found), _CHOICES - 1))
    near = (f"{abs(float(right) + step):.15g}" for step in (1, -1, 10, -10, 2, -2, 100))
    for one in near:
        if len(chosen) >= _CHOICES - 1:
            break
        if float(one) not in map(float, [right, *chosen]):
            chosen.append(one)
    return chosen
