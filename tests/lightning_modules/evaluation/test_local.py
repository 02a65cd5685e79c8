"""Items of one's own files: what is asked, that it can be answered, and that nothing is asked of nothing."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml

from common.variants import variants
from lightning_modules.evaluation.local import LocalTask, base, gsm8k_answer
from lightning_modules.evaluation.local.cloze import Cloze
from lightning_modules.evaluation.local.gsm8k_answer import Gsm8kAnswer
from lightning_modules.evaluation.local.next_sentence import NextSentence
from tests.lightning_modules.evaluation.prose import gsm8k, prose


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a text.json"
    path.write_text(json.dumps([{"text": prose(300, seed)} for seed in range(3)]))
    return str(path)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(gsm8k(40))
    return str(path)


def test_a_cloze_asks_for_the_last_word_which_the_passage_has_told(text):
    items = Cloze(text, items=50).drawn()
    assert len(items) == 50
    for item in items:
        *before, asked = re.split(r"(?<=\.) ", item["context"])
        assert len(before) == 5 and asked.endswith("and met the")
        assert re.search(rf"\b{item['word']}\b", " ".join(before))
    assert any(item["word"] not in item["context"].rpartition(". ")[2] for item in items)


def test_the_right_sentence_is_the_one_that_follows_and_the_others_are_like_it(text):
    whole = " ".join(prose(300, seed) for seed in range(3))
    items = NextSentence(text, items=60).drawn()
    assert {item["label"] for item in items} == {0, 1, 2, 3}, "its place says nothing"
    for item in items:
        right = item["choices"][item["label"]]
        assert f"{item['context']} {right}" in whole
        wrong = [one for i, one in enumerate(item["choices"]) if i != item["label"]]
        assert len({right, *wrong}) == 4
        assert all(0.69 * len(right) <= len(one) <= 1.31 * len(right) for one in wrong)
        assert all(f"{item['context']} {one}" not in whole for one in wrong)


def test_the_result_of_a_problem_is_among_four_numbers_and_not_told_before(problems):
    items = Gsm8kAnswer(problems, items=20).drawn()
    assert len(items) == 20
    for item in items:
        first, second = map(int, re.search(r"has (\d+) apples and buys (\d+)", item["context"]).groups())
        right = item["choices"][item["label"]]
        assert int(right) == first + second and len(set(item["choices"])) == 4
        assert item["context"].endswith(f"{first}+{second}=") and "<<" not in item["context"]
        assert {str(first), str(second)} & set(item["choices"]), "numbers of the problem are there to be copied"


def test_how_a_number_is_written_does_not_tell_which_one_is_right(tmp_path):
    question = {"question": "A mill has 1,000,000 sacks and gets 250,000.", "answer": "It has 1,250,000,\n#### 1250000"}
    (tmp_path / "large.jsonl").write_text(json.dumps(question) + "\n")
    (item,) = Gsm8kAnswer(str(tmp_path / "large.jsonl")).drawn()
    assert item["choices"][item["label"]] == "1250000"
    assert all(re.fullmatch(r"\d+", choice) for choice in item["choices"])


def test_without_a_file_items_are_of_documentation_that_nothing_was_trained_on(monkeypatch):
    documents = [("train", "It was trained on. " * 9), ("val", prose(60))]
    monkeypatch.setattr(base.EmbeddedDocs, "documents", lambda self: iter(documents))
    base.documentation.cache_clear()
    task = NextSentence(items=10)
    task.check()
    assert task.task == "next_sentence_documentation" and len(task.drawn()) == 10
    assert not any("trained" in sentence for item in task.drawn() for sentence in item["choices"])
    base.documentation.cache_clear()


def test_the_same_file_number_and_seed_give_the_same_items(text):
    assert Cloze(text, 20).drawn() == Cloze(text, 20).drawn()
    assert Cloze(text, 20).drawn() != Cloze(text, 20, seed=1).drawn()
    assert len(Cloze(text, 10_000).drawn()) == len(list(Cloze(text).candidates())) > 500


def test_a_task_file_is_written_that_says_where_its_items_are(text, tmp_path):
    task = NextSentence(text, 7)
    file, count = task.write(tmp_path / "tasks")
    config = yaml.safe_load(file.read_text())
    assert count == 7 and task.task == config["task"] == "next_sentence_a_text" == file.stem
    lines = Path(config["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == task.drawn()
    assert Cloze(text, label="mine").write(tmp_path / "tasks")[0].name == "mine.yaml"
    again, _ = NextSentence(text, 9).write(tmp_path / "tasks")
    assert again == file and len((file.parent / "items.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("task", variants(LocalTask), ids=lambda task: task.__name__)
def test_what_gives_no_item_is_refused(task, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text(json.dumps({"text": "a | b | c\n" * 50, "question": "?", "answer": "many\n#### many"}) + "\n")
    with pytest.raises(ValueError, match=rf"local: {task.__name__}: .*none\.jsonl gives no item; give "):
        task(str(path)).drawn()
    with pytest.raises(FileNotFoundError, match=f"local: {task.__name__}: no such file"):
        task(str(tmp_path / "gone.json")).check()
    with pytest.raises(ValueError, match="items must be at least 1"):
        task(str(path), 0)


@pytest.mark.parametrize(("right", "said"), [("7.50", "pays 7.5 dollars, then $7.500"), ("0.5", ""), ("3", "3.0 or 3")])
def test_the_right_number_written_otherwise_is_no_wrong_one(right, said):
    others = gsm8k_answer._others(right, said, random.Random(0))
    values = [float(one) for one in [right, *others]]
    assert len(others) == 3 and len(set(values)) == 4


def test_other_records_than_gsm8ks_are_refused(text):
    with pytest.raises(ValueError, match=r"has no fields question and answer; give GSM8K's JSON lines"):
        Gsm8kAnswer(text).drawn()
