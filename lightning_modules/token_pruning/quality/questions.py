"""Questions that a text answers itself, found by rule: who said a line, and when, where and by whom something was done.

A rule reads a sentence of a known form and turns it into a question; what it leaves out is the answer. As the rules of
Heilman and Smith (2010) do for teaching, but only where the form alone makes question and answer safe.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_modules.token_pruning.quality.asked import Asked, render, sentences, whole_sentences
from lightning_modules.token_pruning.quality.planted import Split

_LAST = 0.9  # answers stand in this share of a passage, from its start
_QUESTION = 64  # tokens that most questions fit in


def _words(listed: str) -> set[str]:
    return set(re.split(r",\s+", listed))


_NAME = r"[A-Z][a-zé]+"
_NAMES = rf"(?P<answer>{_NAME}(?:\s{_NAME}){{0,2}})"
_SAID = "said|cried|asked|replied|answered|returned|exclaimed|observed|remarked|whispered|inquired|repeated|continued"
_TITLES = _words(
    """Mr, Mrs, Miss, Dr, Doctor, Captain, Colonel, Lady, Sir, Lord, Uncle, Aunt, Madame, Monsieur, Don, Prince,
    Princess, Count, Countess, Father, Brother, Sister, Master, Mother, Old, Young, Poor"""
)
_SPEAKER = rf"(?:{_SAID})\s+(?:(?:{'|'.join(sorted(_TITLES))})\.?\s+)?(?P<answer>{_NAME})\b"
_SPOKEN = re.compile(rf"[“\"](?P<line>[^“”\"]{{20,140}}?)[”\"]\s+{_SPEAKER}")
_NO_NAMES = _TITLES | _words(
    """The, This, That, There, Then, They, These, Those, And, But, For, Not, Yes, Her, His, She, What, When, Who, How,
    You, It, He, We, One, Oh, Well, No, My, Your, Our, January, February, March, April, May, June, July, August,
    September, October, November, December, Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"""
)

_SUBJECT = r"(?P<subject>(?:[A-Z][\w'’.-]*)(?:\s[\w'’.-]+){0,6}?)"
_NO_SUBJECT = re.compile(  # begins with another word than a noun, or has a verb in it
    r"^(It|He|She|They|We|You|I|There|This|That|These|Those|What|Who|Which|When|Where|While|As|If|In|On|At|By|For|From|"
    r"After|Before|During|With|Although|Though|However|But|And|Or|One|Some|Many|Most|More|Much|All|Both|Each|Another|"
    r"Other|Others|His|Her|Its|Their|My|Our|Here|Since|Until|Despite|Two|Three|Four|Five|Several|Such|Every|Neither|"
    r"Notably|Additionally|Only|Also|Later)\b|\b(is|are|was|were|has|had|that|which|who|to|until|and|would|be)\b"
)
_DONE = (
    r"(?P<was>was|were)\s(?P<done>(?:\w+ly\s)?(?:\w{2,}ed|born|built|held|found|made|sung|shot|written|begun|won|sold)"
)
_YEAR = r"(?P<answer>1[0-9]{3}|20[0-9]{2})\b"
_MORE = r"(?:\s(?!and\b|but\b|that\b)[^\s,;:.()“”\"]+){0,8}?"
_FACTS = [
    ("year", "In which year", re.compile(rf"^{_SUBJECT}\s{_DONE}{_MORE})\sin\s(?:{_NAME}\s)?{_YEAR}")),
    ("year", "In which year", re.compile(rf"^In\s(?:{_NAME}\s)?{_YEAR}\s?,\s{_SUBJECT}\s{_DONE}{_MORE})\s?[,.;]")),
    ("place", "Where", re.compile(rf"^{_SUBJECT}\s{_DONE})\s(?:in|at|near)\s(?:the\s)?{_NAMES}")),
    ("agent", "By whom", re.compile(rf"^{_SUBJECT}\s{_DONE}(?:\sand\s\w+ed)?)\sby\s{_NAMES}")),
]
"""Kind, first words of the question, and the form of the sentence."""


class Found(NamedTuple):
    """A question that a passage answers.

    Attributes:
        kind: Name of the rule.
        question: What it asks.
        span: Where in the passage the answer stands, [start, end).
        told: Where what tells it stands, the answer in it.
        others: Of the answer's kind, in the passage too: names or years.
    """

    kind: str
    question: str
    span: tuple[int, int]
    told: tuple[int, int]
    others: frozenset[str] = frozenset()


def find_questions(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    count: int,
    seed: int = 0,
    split: Split | None = None,
) -> list[Asked]:
    """Prompts with a question each, about passages that do not overlap, lengths in turn.

    Args:
        texts: Novels, articles: whatever has dialogue or facts.
        tokenizer: The model's.
        lengths: Most tokens of a prompt.
        count: Prompts.
        seed: Which passages, and which of their questions.
        split: Whose half of the passages, for calibration and testing on one text; None takes them all.

    Raises:
        ValueError: The texts hold fewer such questions, or a length is too short for one.
    """
    if count < 1 or not lengths:
        raise ValueError(f"count must be at least 1, and lengths must not be empty; got {count} and {list(lengths)}")
    rest = len(render(tokenizer, "", (0, 0), "", "").ids) + _QUESTION
    if min(lengths) < 2 * rest:
        raise ValueError(f"lengths: {min(lengths)} tokens are too few, template and question alone have {rest}")
    stream, draw = "\n\n".join(texts), random.Random(seed)
    left = _stretches(stream, tokenizer, lengths, split)
    for places in left:
        draw.shuffle(places)
    prompts: list[Asked] = []
    while len(prompts) < count:
        turn = len(prompts) % len(lengths)
        if not left[turn]:
            raise ValueError(
                f"the texts are too short: only {len(prompts)} of {count} questions were found in passages of "
                f"{min(lengths)} to {max(lengths)} tokens; give more text (dialogue, or articles with years and "
                "names), or ask for fewer"
            )
        start, end = left[turn].pop()
        text = whole_sentences(stream[start:end], tokenizer, lengths[turn] - rest)
        asked = None if text is None else _one_of(text, tokenizer, draw)
        if asked is not None and len(asked.ids) <= lengths[turn]:
            prompts.append(asked)
    return prompts


def _stretches(
    stream: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], split: Split | None
) -> list[list[tuple[int, int]]]:
    """Stretches of text [start, end) that hold a passage, for every length; none overlap."""
    sample = stream[: 1 << 17]
    width = 1.25 * len(sample) / max(1, len(tokenizer(sample, add_special_tokens=False).input_ids))
    found: list[list[tuple[int, int]]] = [[] for _ in lengths]
    start = number = 0
    while True:
        turn, of = divmod(number, len(lengths))
        end = start + int(width * lengths[of])
        if end > len(stream) or not width:
            return found
        if split is None or turn % 2 == (split == "test"):
            found[of].append((start, end))
        start, number = end, number + 1


def _one_of(text: str, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> Asked | None:
    """One of the questions that a passage answers, rare kinds as often as common ones; None where there is none."""
    kinds: dict[str, list[Found]] = {}
    for found in ask(text):
        kinds.setdefault(found.kind, []).append(found)
    if not kinds:
        return None
    found = draw.choice(kinds[draw.choice(sorted(kinds))])
    return render(tokenizer, text, found.span, found.question, found.kind, others=found.others, told=found.told)


def ask(text: str) -> Iterator[Found]:
    """All questions that a passage answers, where the answer is not the only name of its kind."""
    names = set(re.findall(rf"(?<=[a-z,;]\s){_NAME}", text)) - _NO_NAMES
    years = set(re.findall(r"\b(?:1[0-9]{3}|20[0-9]{2})\b", text))
    for found in (*_spoken(text), *_facts(text)):
        answer = text[slice(*found.span)]
        others = (years if found.kind == "year" else names) - {answer, *answer.split()}
        told = re.search(rf"\b{re.escape(answer)}\b", found.question, re.IGNORECASE)
        if len(others) >= _OTHERS[found.kind] and not told and found.span[1] <= _LAST * len(text):
            yield found._replace(others=frozenset(others - _first_names(text, answer)))


def _first_names(text: str, name: str) -> set[str]:
    """Words with which a text gives a name more fully, such as Sarah of Pocket."""
    fuller = re.findall(rf"((?:{_NAME}\s+)+){re.escape(name)}\b", text)
    return {word for words in fuller for word in words.split()}


_OTHERS = {"speaker": 2, "year": 1, "place": 2, "agent": 2}
"""How many others of its kind, a name or a year, a passage must have beside the answer."""


def _spoken(text: str) -> Iterator[Found]:
    ends = sentences(text)
    for match in _SPOKEN.finditer(text):
        if match["answer"] not in _NO_NAMES and text.count(match["line"]) == 1:
            line = " ".join(match["line"].split()).rstrip(" ,.")
            begins = max((place for place in (0, *ends) if place <= match.start()), default=0)
            told = (begins, min(place for place in (*ends, len(text)) if place >= match.end()))
            yield Found("speaker", f'Who said "{line}"?', match.span("answer"), told)


def _facts(text: str) -> Iterator[Found]:
    begins = sorted({0, *sentences(text), *(line.end() for line in re.finditer(r"\n\s*", text))})
    for start, end in pairwise([*begins, len(text)]):
        for kind, words, rule in _FACTS:
            match = rule.search(text[start:end])
            if match is None or _NO_SUBJECT.search(match["subject"]) or match["answer"].split()[0] in _NO_NAMES:
                continue
            subject = re.sub("^(The|A|An) ", lambda article: article[0].lower(), match["subject"])
            first, last = match.span("answer")
            question = f"{words} {match['was']} {subject} {match['done']}?"
            yield Found(kind, question, (start + first, start + last), (start, end))
