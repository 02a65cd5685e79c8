"""Samples of LongBench-style files (arXiv 2308.14508): a context, a question, and answers that are right."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lightning_modules.token_pruning.quality.asked import Asked, render
from lightning_modules.token_pruning.quality.tasks import Window


class Sample(NamedTuple):
    """One record.

    Attributes:
        where: Of it, for messages.
        context: What is read.
        question: Without white space around it; "" for summaries, which have none.
        answers: All that are right, one at least.
    """

    where: str
    context: str
    question: str
    answers: list[str]


def samples(path: Path) -> Iterator[Sample]:
    """The records of a file.

    Args:
        path: JSON lines, or a JSON array, of ``{"context", "input", "answers"}``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON; or a sample without context, question or answer, or with one that is no text, naming
            it: a benchmark without its contexts measures nothing.
    """
    for number, record in enumerate(_records(path), 1):
        where = f"{path}, sample {number}"
        given = record if isinstance(record, dict) else {}
        context, question, answers = (given.get(field) for field in ("context", "input", "answers"))
        answers = answers if isinstance(answers, list) else [answers]
        answers = ["" if answer is None else str(answer) for answer in answers]
        good = {
            "context": isinstance(context, str) and context.strip(),
            "input": isinstance(question, str) and (question == "" or question.strip()),
            "answers": answers and all(answer.strip() for answer in answers),
        }
        for field, fine in good.items():
            if not fine:
                raise ValueError(f"{where}: {field} is missing, empty or no text; nothing would be measured")
        yield Sample(where, str(context), str(question).strip(), answers)


def windows(path: Path, tokenizer: PreTrainedTokenizerBase, max_prompt: int) -> Iterator[Window]:
    """The context and the question are the prompt, the first answer the suffix.

    A context that is too long loses its middle, as in LongBench.

    Args:
        path: See ``samples``.
        tokenizer: The model's.
        max_prompt: Longest prompt in tokens.

    Raises:
        ValueError: See ``samples``; or a question that is longer than a prompt.
    """
    for sample in samples(path):
        question = tokenizer(f"\n\n{sample.question}\n", add_special_tokens=False).input_ids
        context = tokenizer(sample.context, add_special_tokens=False).input_ids
        context = _cut(context, max_prompt - len(question), sample)
        prompt = torch.tensor([context + question])
        suffix = torch.tensor([tokenizer(sample.answers[0], add_special_tokens=False).input_ids])
        yield Window(prompt, suffix, suffix)


def asked(path: Path, tokenizer: PreTrainedTokenizerBase, max_prompt: int, count: int) -> list[Asked]:
    """The questions, in the model's chat template where it has one, to be answered freely.

    Any of a sample's answers is right. Samples without a question are passed over.

    Args:
        path: See ``samples``.
        tokenizer: The model's.
        max_prompt: Longest prompt in tokens; a context that is too long loses its middle.
        count: How many, at most.

    Raises:
        ValueError: See ``windows`` and ``render``, naming the sample; or no sample has a question.
    """
    found: list[Asked] = []
    for sample in samples(path):
        if len(found) == count:
            break
        if sample.question:
            found.append(_asked(sample, tokenizer, max_prompt))
    if not found:
        raise ValueError(f"{path}: no sample has a question (input) to be answered freely")
    return found


def _asked(sample: Sample, tokenizer: PreTrainedTokenizerBase, max_prompt: int) -> Asked:
    ids = tokenizer(sample.context, add_special_tokens=False).input_ids
    text, room = sample.context, len(ids)
    while True:
        found = (re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) for answer in sample.answers)
        place = next((one.span() for one in found if one), (0, 0))
        try:
            one = render(tokenizer, text, place, sample.question, "longbench")
        except ValueError as error:
            raise ValueError(f"{sample.where}: {error}") from error
        over = len(one.ids) - max_prompt
        if over <= 0:
            return replace(one, answer=sample.answers[0], also=tuple(sample.answers[1:]))
        room -= over  # what is read anew may have a token more at its seam
        text = str(tokenizer.decode(_cut(ids, room, sample)))


def _cut(context: list[int], room: int, sample: Sample) -> list[int]:
    """The beginning and the end of a context, in so many tokens."""
    if room < 1:
        raise ValueError(f"{sample.where}: its question alone is longer than max_prompt")
    if len(context) <= room:
        return context
    return context[: room - room // 2] + (context[-(room // 2) :] if room > 1 else [])


def _records(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no LongBench-style file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is neither JSON lines nor a JSON array: {error}") from error
