"""A question about a text, rendered as the prompt that a model gets, and where in it the answer stands."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
        depth: Where the answer begins, as a share of the prompt; None where it stands nowhere.
        others: What the text says of the same kind and the question does not: to come to one of these first is wrong.
        also: Other answers that are as right.
        told: Tokens of the sentence that tells the answer, bool `[N]`; None where that is not known.
        beside: Tokens of another sentence, as long as that one as nearly as any; None where there is none.
    """

    ids: Tensor
    evidence: Tensor
    answer: str
    kind: str
    depth: float | None
    others: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    told: Tensor | None = None
    beside: Tensor | None = None

    def without(self, left_out: Tensor) -> "Asked":
        """The same question about a text that lacks these tokens, bool `[N]`."""
        stays = ~left_out
        return replace(self, ids=self.ids[stays], evidence=self.evidence[stays], told=None, beside=None)


def render(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    span: tuple[int, int],
    question: str,
    kind: str,
    prefix: str = "",
    others: Iterable[str] = (),
    told: tuple[int, int] | None = None,
) -> Asked:
    """Ask about a text: as a chat where the tokenizer has a template, else as plain text.

    Args:
        tokenizer: The model's.
        text: The passage.
        span: Characters [start, end) of `text` that are the answer; an empty one where it has none.
        question: Stands after the text.
        kind: See `Asked`.
        prefix: The beginning of the answer, which the model goes on with; "" lets it answer freely.
        others: What else of the kind the text says.
        told: Characters [start, end) of `text` that tell the answer, the answer among them.

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
    # a template writes the special tokens itself
    coded = tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True)

    def tokens_of(place: tuple[int, int]) -> Tensor:
        start, said = begins + place[0], text[slice(*place)].rstrip()  # the space after a sentence is the next one's
        end = start + len(said)
        # tokens that are parts of one character all have its place
        return torch.tensor([first < end and last > start for first, last in coded["offset_mapping"]])

    evidence, beside = tokens_of(span), None if told is None else _beside(text, told)
    depth = int(evidence.int().argmax()) / len(evidence) if evidence.any() else None
    rivals = tuple(sorted(other for other in others if other not in question))
    return Asked(
        torch.tensor(coded["input_ids"]),
        evidence,
        text[span[0] : span[1]],
        kind,
        depth,
        rivals,
        told=None if told is None else tokens_of(told),
        beside=None if beside is None else tokens_of(beside),
    )


def _beside(text: str, told: tuple[int, int]) -> tuple[int, int] | None:
    """The sentence that is as long as what was told, as nearly as any; the first of equals."""
    apart = [one for one in pairwise([0, *sentences(text), len(text)]) if one[1] <= told[0] or one[0] >= told[1]]
    return min(apart, key=lambda one: abs((one[1] - one[0]) - (told[1] - told[0])), default=None)


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
