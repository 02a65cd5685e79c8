"""Questions that text answers itself: what rules find, what they leave alone, and passages that do not overlap."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_modules.data.tokenizer import load_tokenizer, train_bpe
from lightning_modules.token_pruning.quality.questions import ask, find_questions

SHARED = Path(__file__).parents[3] / "../shared"
NAMES = "Anna", "Berta", "Carla", "Dora", "Elsa", "Frida"
DIALOGUE = [
    "\n\n".join(
        f"The evening was long and quiet, and they sat by the fire as on {n + shift} evenings before. "
        f"“It has rained for {n + shift} days without an end,” said {NAMES[(n + shift) % 6]}. "
        f"Nobody but {NAMES[(n + shift + 1) % 6]} and old {NAMES[(n + shift + 2) % 6]} cared for the weather."
        for n in range(60)
    )
    for shift in (0, 1000)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([DIALOGUE]), 500)


def found(text, others="so said Anna, and Berta, and the years 1801, 1802 and all. " * 2, after=" And so on." * 9):
    text = others + text + after
    return [(one.kind, one.question, text[slice(*one.span)]) for one in ask(text)]


@pytest.mark.parametrize(
    ("text", "kind", "question", "answer"),
    [
        (
            "“You should not have come so late,” said Mr. Pumblechook.",
            "speaker",
            'Who said "You should not have come so late"?',
            "Pumblechook",
        ),
        (
            '"You should not have\ncome so late!" cried Joe, and wept.',
            "speaker",
            'Who said "You should not have come so late!"?',
            "Joe",
        ),
        (
            "The old bridge was finally demolished by the army in June 1927 .",
            "year",
            "In which year was the old bridge finally demolished by the army?",
            "1927",
        ),
        (
            "In 1842 , Fort Scott was named after a general .",
            "year",
            "In which year was Fort Scott named after a general?",
            "1842",
        ),
        ("The match was played in New Orleans .", "place", "Where was the match played?", "New Orleans"),
        (
            "A first edition was printed by Daniel Chun .",
            "agent",
            "By whom was a first edition printed?",
            "Daniel Chun",
        ),
    ],
)
def test_rules_turn_sentences_into_questions(text, kind, question, answer):
    assert found(text) == [(kind, question, answer)]


@pytest.mark.parametrize(
    "text",
    [
        "“You should not have come so late,” said he.",
        "“You should not have come so late,” said Mr. Drummle’s “You should not have come so late,” said Joe.",
        "“Joe, you should not have come so late,” said Joe.",
        "It was built in 1927 .",
        "The bridge that was closed was rebuilt in 1927 .",
        "The mayor is a man who was elected in 1927 .",
        "The match was played in June .",
    ],
    ids=["pronoun", "twice", "in the question", "no subject", "nested", "two verbs", "month"],
)
def test_what_would_not_be_a_safe_question_is_left_alone(text):
    assert not found(text)


def test_an_answer_is_one_of_several_and_not_at_the_very_end():
    line = "“You should not have come so late,” said Joe."
    assert found(line) and not found(line, others="so said he, long ago, and that was that. " * 3)
    assert not found(line, after="")
    assert found("The bridge was built in 1927 .") and not found("The bridge was built in 1927 .", others="so. " * 20)


def test_prompts_hold_their_answers_and_do_not_overlap(tokenizer):
    prompts = find_questions(DIALOGUE, tokenizer, [400, 600], 8)
    texts = [tokenizer.decode(asked.ids) for asked in prompts]
    stream, places = "\n\n".join(DIALOGUE), []
    for asked, text in zip(prompts, texts, strict=True):
        assert tokenizer.decode(asked.ids[asked.evidence]).strip() == asked.answer
        passage, _, question = text.partition("\n\nQuestion: ")
        line = question.split('"')[1]
        assert f"“{line},” said {asked.answer}." in passage and asked.answer not in question
        told, other = (tokenizer.decode(asked.ids[part]).strip() for part in (asked.told, asked.beside))
        assert told == f"“{line},” said {asked.answer}." and other in passage and abs(len(other) - len(told)) < 40
        assert (
            not (asked.told & asked.beside).any() and line not in tokenizer.decode(asked.without(asked.told).ids)[:-200]
        )
        assert len(asked.others) > 1 and asked.answer not in asked.others
        assert all(other in passage and other not in question for other in asked.others)
        places.append((stream.index(passage), stream.index(passage) + len(passage)))
    places.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    assert sorted(len(asked.ids) > 400 for asked in prompts) == [False] * 4 + [True] * 4
    assert max(len(asked.ids) for asked in prompts) <= 600


def test_seeds_choose_others_and_halves_share_no_passage(tokenizer):
    def passages(**options):
        asked = find_questions(DIALOGUE, tokenizer, [400], **{"count": 3, **options})
        return [tokenizer.decode(one.ids).partition("\n\nQuestion")[0] for one in asked]

    assert passages() == passages(seed=0) != passages(seed=1)
    halves = [{p for seed in range(5) for p in passages(seed=seed, split=split)} for split in ("calibration", "test")]
    assert not halves[0] & halves[1] and min(map(len, halves)) > 3


def test_text_without_such_sentences_says_how_many_there_were(tokenizer):
    with pytest.raises(ValueError, match="only 0 of 2 questions were found in passages of 400 to 400 tokens"):
        find_questions(["nothing is said here, by nobody, at no time. " * 400], tokenizer, [400], 2)
    with pytest.raises(ValueError, match=r"only \d+ of 400 questions"):
        find_questions(DIALOGUE, tokenizer, [400], 400)
    with pytest.raises(ValueError, match="lengths: 100 tokens are too few"):
        find_questions(DIALOGUE, tokenizer, [100], 1)


@pytest.mark.skipif(not (SHARED / "data/books").is_dir(), reason="needs the texts and tokenizer of ../shared")
def test_novels_and_articles_hold_hundreds():
    novels = [section["text"] for section in json.loads((SHARED / "data/books/train.json").read_text())][::8]
    passages = [text[start : start + 2500] for text in novels for start in range(0, len(text), 2500)]
    assert sum(any(one.kind == "speaker" for one in ask(passage)) for passage in passages) > 200
    articles = (SHARED / "data/wikitext2/valid.txt").read_text()
    kinds = [one.kind for start in range(0, len(articles), 5000) for one in ask(articles[start : start + 5000])]
    assert len(kinds) > 40 and {"year", "place", "agent"} <= set(kinds)
    tokenizer = load_tokenizer(str(SHARED / "tokenizers/gpt2"))
    prompts = find_questions(novels, tokenizer, [600, 1200], 12)
    assert len({asked.ids[50:150].numpy().tobytes() for asked in prompts}) == 12
    assert len({asked.answer for asked in prompts}) > 6
