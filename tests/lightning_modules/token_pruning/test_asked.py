"""Questions about text: what is planted, where the answer stands, and what counts as a right one."""

import re
from itertools import pairwise

import pytest
import torch

from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality.answers import answer, answer_in_full, is_right
from lightning_modules.token_pruning.quality.asked import Asked, cut, render, sentences
from lightning_modules.token_pruning.quality.planted import FACTS, plant
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.recency import Recency
from tests.lightning_modules.token_pruning.models import shared

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ '<|assistant|>\n' }}"
TEXTS = [
    " ".join(f"Mr. Smith saw the {animal} number {n} near the old mill on day {n}." for n in range(120))
    for animal in ("fox", "hen", "naïve 🦊 cat", "pike")
]


@pytest.fixture(scope="module")
def plain():
    return train_bpe(iter([TEXTS]), 400)


@pytest.fixture(scope="module")
def chatting():
    tokenizer = train_bpe(iter([TEXTS]), 400)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind_of", ["plain", "chatting"])
def test_evidence_is_the_tokens_of_the_planted_value_and_no_others(kind_of, prefix, request):
    tokenizer = request.getfixturevalue(kind_of)
    prompts = plant(TEXTS, tokenizer, [500, 600], 12, prefix)
    assert {asked.kind for asked in prompts} == {name for name, fact in FACTS.items() if not fact.held_out}
    for asked in prompts:
        places = asked.evidence.nonzero()[:, 0]
        assert places.diff().eq(1).all() and asked.depth == int(places[0]) / len(asked.ids)
        assert tokenizer.decode(asked.ids[places]).strip(' ".') == asked.answer
        for end in (places[1:], places[:-1]):  # each of them is needed
            assert asked.answer not in tokenizer.decode(asked.ids[end])
        told, beside = (tokenizer.decode(asked.ids[part]).strip() for part in (asked.told, asked.beside))
        assert told.startswith(FACTS[asked.kind].said.split("{}")[0]) and asked.answer in told and len(told) < 90
        assert "Smith saw" in beside and not (asked.told & asked.beside).any()
        whole = tokenizer.decode(asked.ids)
        assert asked.answer not in tokenizer.decode(asked.without(asked.told).ids)
        assert len(asked.without(asked.beside).ids) == len(asked.ids) - int(asked.beside.sum())
        assert whole.count(asked.answer) == 1 and whole.index(asked.answer) < whole.index("Question: ")
        ending = whole[whole.index("?", whole.index("Question: ")) :]
        free = "?<|end|>\n<|assistant|>\n" if kind_of == "chatting" else "?\nAnswer:"
        said = FACTS[asked.kind].said.split("{}")[-1] if prefix else ""
        assert ending.startswith(free) and ending.endswith(said) and (ending == free) == (not prefix)
        assert ("<|assistant|>" in whole) == (kind_of == "chatting")


@pytest.mark.parametrize("prefix", [False, True])
def test_testing_asks_for_kinds_that_calibration_does_not_know(prefix, plain):
    prompts = plant(TEXTS, plain, [500], 10, prefix, split="test")
    assert sorted(asked.kind for asked in prompts) == sorted(FACTS) and any(
        FACTS[asked.kind].held_out for asked in prompts
    )
    for asked in prompts:
        assert plain.decode(asked.ids[asked.evidence]).strip(' ".') == asked.answer
        assert plain.decode(asked.ids).count(asked.answer) == 1


def test_distractors_are_of_the_same_kind_and_only_the_question_tells_them_apart(plain):
    prompts = plant(TEXTS, plain, [640, 760], 20, distractors=2, split="test")
    firsts = 0
    for asked in prompts:
        fact, whole = FACTS[asked.kind], plain.decode(asked.ids)
        said = {}
        for about in fact.about:
            if found := re.search(re.escape(fact.said.format(about)) + r' "?(.+?)"?\. ', whole):
                said[about] = found[1]
        assert len(said) == len(set(said.values())) == 3
        about = next(about for about, answer in said.items() if answer == asked.answer)
        assert fact.asked.format(about) in whole
        assert plain.decode(asked.ids[asked.evidence]).strip(' ".') == asked.answer
        assert len(asked.ids) <= 760
        firsts += min(said, key=whole.index) == about
    assert 0 < firsts < 20
    with pytest.raises(ValueError, match="distractors must lie between 0 and 5"):
        plant(TEXTS, plain, [500], 1, distractors=6)


def test_parts_of_a_character_are_evidence_together(plain):
    text = "He met a 🦊 there."
    asked = render(plain, text, (9, 10), "Whom?", "animal")
    assert plain.decode(asked.ids[asked.evidence]).strip() == "🦊"
    whole = plain.decode(asked.ids[~asked.evidence])
    assert "�" not in whole and "🦊" not in whole


def test_lengths_kinds_and_depths_are_spread_and_passages_used_once(plain):
    prompts = plant(TEXTS, plain, [400, 800], 12)
    sizes = [len(asked.ids) for asked in prompts]
    assert all(size <= 800 for size in sizes) and sum(size <= 400 for size in sizes) == 6
    assert min(size for size in sizes if size > 400) > 600 and min(sizes) > 300
    depths = sorted(asked.depth for asked in prompts)
    assert depths[0] < 0.2 and depths[-1] > 0.75 and max(b - a for a, b in pairwise(depths)) < 0.2
    passages = cut(TEXTS, plain, [300] * 10)
    stream = "\n\n".join(TEXTS)
    places = [stream.index(passage) for passage in passages]
    assert places == sorted(places)
    assert all(a + len(p) <= b for a, p, b in zip(places, passages, places[1:], strict=False))
    assert all(passage.startswith("Mr. ") and passage.endswith(".") for passage in passages)


def test_seeds_draw_again_and_splits_share_no_answer(plain):
    drawn = [[asked.answer for asked in plant(TEXTS, plain, [400], 12, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    answers = {
        split: {(a.kind, a.answer) for seed in range(8) for a in plant(TEXTS, plain, [400], 18, False, seed, split)}
        for split in ("calibration", "test")
    }
    assert not answers["calibration"] & answers["test"] and min(map(len, answers.values())) > 50


def test_text_that_is_too_short_says_what_there_is_and_what_is_needed(plain):
    with pytest.raises(ValueError, match=r"hold about [\d,]+ tokens, and 40 passages .* need [\d,]+"):
        plant(TEXTS, plain, [2000], 40)
    with pytest.raises(ValueError, match="too short"):
        plant([""], plain, [2000], 1)
    with pytest.raises(ValueError, match="lengths: 50 tokens are too few"):
        plant(TEXTS, plain, [50], 1)
    with pytest.raises(ValueError, match="lengths must not be empty"):
        plant(TEXTS, plain, [], 1)


def test_a_template_that_changes_the_text_is_refused(plain):
    other = train_bpe(iter([TEXTS]), 300)
    other.chat_template = TEMPLATE.replace("m.content", "m.content | upper")
    with pytest.raises(ValueError, match="chat template changes"):
        render(other, "The fox.", (4, 7), "Who?", "animal")


def test_titles_and_initials_end_no_sentence():
    text = 'Dr. Watson met Mrs. Bell and J. Smith. "Good day," he said. Then? He left!'
    assert [text[begin:][:4] for begin in sentences(text)] == ['"Goo', "Then", "He l"]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ('It is "Amber Falcon".', True),
        ("amber-falcon", True),
        ("amber\nfalcon!", True),
        ("amber falcons", False),
        ("chamber falcon", False),
        ("falcon amber", False),
        ("", False),
    ],
)
def test_an_answer_is_right_word_by_word(said, right):
    asked = Asked(torch.ones(1), torch.ones(1), "amber falcon", "password", 0.0)
    assert is_right(asked, said) is right
    assert is_right(Asked(torch.ones(1), torch.ones(1), "7:43", "time", 0.0), "at 7:43.")
    assert not is_right(Asked(torch.ones(1), torch.ones(1), "7:43", "time", 0.0), "at 17:43")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Joe said it, not Pip.", True),
        ("That was Joe", True),
        ("Pip said it to Joe.", False),
        ("Pip Joe", False),
        ("The Pippin of Joe's", True),
    ],
)
def test_who_comes_to_another_of_the_kind_first_is_wrong(said, right):
    assert is_right(Asked(torch.ones(1), torch.ones(1), "Joe", "speaker", 0.0, ("Pip", "Estella")), said) is right


def test_answers_are_greedy_whatever_the_model_s_own_configuration_says(plain):
    model = shared("llama", vocab_size=400)
    asked = Asked(torch.arange(5, 60), torch.zeros(55, dtype=torch.bool), "x", "code", 0.0)
    ids = asked.ids[None]
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = plain.decode(ids[0, 55:], skip_special_tokens=True)
    before = model.generation_config
    model.generation_config = type(before)(do_sample=True, temperature=9.0, max_length=3)
    try:
        assert answer(model, plain, asked, None, 8) == expected
    finally:
        model.generation_config = before
    assert answer_in_full(model, plain, asked, None, 8).cached == 1.0
    # 2 of 6 layers read all, 4 read 28 of 55
    pruner = PromptPruner(Recency(), Schedule(layers=[1], keep=0.5, sinks=0, tail=0.0, min_tail=1))
    pruned = answer_in_full(model, plain, asked, pruner, 8)
    assert pruned.cached == pytest.approx((2 * 55 + 4 * 28) / (6 * 55)) and pruned.text != expected


def test_one_long_sentence_does_not_make_a_text_too_short():
    tokenizer = train_bpe(["the quick brown fox jumps over a lazy dog."], 300)
    text = "A start. The " + "very " * 300 + "long one. " + "The fox jumps over a dog. " * 200
    assert [len(found) > 0 for found in cut([text], tokenizer, [120])] == [True]
