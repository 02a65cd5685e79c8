"""A question about a text, rendered as the prompt that a model gets, and where in it the answer stands."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_INSTRUCTION = "Read the text and answer the question."
# where a sentence begins; titles and initials end none
_BEGINS = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][\"”’')]*\s+(?=[\"“‘'(]*[A-Z])")


@dataclass(frozen=True)
class Asked:
    """A rendered prompt whose question comes after the text that answers it.

    Attributes:
        ids: Tokens of the prompt, int64 `[N]`.
        evidence: Which of them hold the answer, bool `[N]`.
        answer: What a right answer contains.
        kind: What is asked for, such as "code" or "speaker".
        depth: Where the answer begins, as a share of the prompt.
        others: What the text says of the same kind and the question does not: to come to one of these first is wrong.
        also: Other answers that are as right.
    """

    ids: Tensor
    evidence: Tensor
    answer: str
    kind: str
    depth: float
    others: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def render(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    span: tuple[int, int],
    question: str,
    kind: str,
    prefix: str = "",
    others: Iterable[str] = (),
) -> Asked:
    """Ask about a text: as a chat where the tokenizer has a template, else as plain text.

    Args:
        tokenizer: The model's.
        text: The passage.
        span: Characters [start, end) of `text` that are the answer.
        question: Stands after the text.
        kind: See `Asked`.
        prefix: The beginning of the answer, which the model goes on with; "" lets it answer freely.
        others: What else of the kind the text says.

    Raises:
        ValueError: The tokenizer cannot say which characters a token holds, or its template changes the text.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token holds: the model needs a tokenizer.json"
        )
    if tokenizer.chat_template is None:
        begins, prompt = 0, f"{text}\n\nQuestion: {question}\nAnswer:{' ' if prefix else ''}{prefix}"
    else:
        begins = len(_INSTRUCTION) + 2
        content = f"{_INSTRUCTION}\n\n{text}\n\nQuestion: {question}"
        message = [{"role": "user", "content": content}]
        prompt = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)) + prefix
        if content not in prompt:
            raise ValueError(
                "the tokenizer's chat template changes what is said: the answer cannot be found in it again"
            )
        begins += prompt.index(content)
    start, end = begins + span[0], begins + span[1]
    # a template writes the special tokens itself
    coded = tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True)
    # tokens that are parts of one character all have its place
    evidence = torch.tensor([first < end and last > start for first, last in coded["offset_mapping"]])
    depth = int(evidence.int().argmax()) / len(evidence)
    rivals = tuple(sorted(other for other in others if other not in question))
    return Asked(torch.tensor(coded["input_ids"]), evidence, text[span[0] : span[1]], kind, depth, rivals)


def sentences(text: str) -> list[int]:
    """Where sentences begin, the first one left out."""
    return [found.end() for found in _BEGINS.finditer(text)]


def cut(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sizes: Sequence[int]) -> list[str]:
    """Cut passages of whole sentences, spread over the texts, no two overlapping.

    Args:
        texts: In order; a passage may go over from one to the next.
        tokenizer: Counts.
        sizes: Most tokens of each passage.

    Raises:
        ValueError: The texts are too short for that.
    """
    stream, total = "\n\n".join(texts), sum(sizes)
    found, before = [], 0
    for size in sizes:
        # each passage has a stretch of its own, in proportion to its size
        start, end = (len(stream) * upto // total for upto in (before, before + size))
        before += size
        passage = None
        while passage is None and start < end:  # one long sentence does not make a text too short
            passage = whole_sentences(stream[start : min(end, start + 16 * size)], tokenizer, size)
            start += 4 * size
        if passage is None:
            sample = stream[: 1 << 20]
            have = len(stream) * len(tokenizer(sample, add_special_tokens=False).input_ids) // max(1, len(sample))
            raise ValueError(
                f"the texts are too short: they hold about {have:,} tokens, and {len(sizes):,} passages of "
                f"{min(sizes):,} to {max(sizes):,} tokens of whole sentences need {int(total * 1.25):,}; give more "
                "text, or ask for fewer or shorter prompts"
            )
        found.append(passage)
    return found


def whole_sentences(stretch: str, tokenizer: PreTrainedTokenizerBase, size: int) -> str | None:
    """A passage from a stretch of text, at most `size` tokens; None where it would have less than three quarters."""
    begins = sentences(stretch)
    if not begins:
        return None
    stretch = stretch[begins[0] :]
    places = tokenizer(stretch, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room = places[size][0] if size < len(places) else len(stretch)
    ends = [end for end in sentences(stretch) if end <= room]
    if not ends or sum(last <= ends[-1] for _, last in places) < 0.75 * size:
        return None
    return stretch[: ends[-1]].strip()
