import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from jsonargparse import ArgumentParser

from lightning_modules.data import hub
from lightning_modules.data.text import TextCorpus
from tests.lightning_modules.data.toy import sentences

BOOKS = Path(__file__).parents[3] / "../shared/data/books/valid.json"


def write(path, texts):
    path.write_text(json.dumps([{"id": str(i), "text": text} for i, text in enumerate(texts)]))
    return str(path)


def corpus(tmp_path, train, **kwargs):
    return TextCorpus(train, **{"cache_dir": str(tmp_path / "cache"), "block_size": 16, "vocab_size": 300, **kwargs})


def test_inputs_are_the_files_and_folders_that_are_read(tmp_path):
    train = write(tmp_path / "a.json", sentences(0, 4))
    (tmp_path / "tokenizer").mkdir()
    data = TextCorpus(train, str(tmp_path), tokenizer=str(tmp_path / "tokenizer"))
    assert data.inputs() == [Path(train), tmp_path, tmp_path / "tokenizer"]
    assert TextCorpus("owner/hub-data", tokenizer="gpt2", val_split="test").inputs() == []


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_one_file_is_divided_by_the_text_of_its_documents(tmp_path):
    texts = sentences(0, 200)
    data = corpus(tmp_path, write(tmp_path / "a.json", [*texts, *texts[:50]]), val_percent=20)
    split = {"train": [], "val": []}
    for name, text in data.documents():
        split[name].append(text)
    assert not set(split["train"]) & set(split["val"])
    assert sorted(split["train"] + split["val"]) == sorted(texts + texts[:50])
    assert 20 < len(split["val"]) < 90
    assert ready(data).describe()["documents"] == {name: len(texts) for name, texts in split.items()}


def test_two_files(tmp_path):
    train, val = write(tmp_path / "a.json", sentences(0, 50)), tmp_path / "b.txt"
    val.write_text("\n".join(sentences(1, 5)))
    data = ready(corpus(tmp_path, train, val=str(val)))
    assert data.describe()["documents"] == {"val": 1, "train": 50}
    assert data.name == "a.json"


def test_same_file_for_both_splits_is_refused(tmp_path):
    file = write(tmp_path / "a.json", sentences(0, 50))
    with pytest.raises(ValueError, match=r"train: no usable document \(50 also in validation\)"):
        corpus(tmp_path, file, val=file).prepare_data()


def _mixture(tmp_path):
    """Long documents of letters a, short ones of b, and instructions of c; each of its own length."""
    files = [tmp_path / "a.txt", tmp_path / "b.json", tmp_path / "c.jsonl"]
    files[0].write_text("\n\n".join(f"{i} " + "a" * 900 for i in range(200)))
    files[1].write_text(json.dumps([{"text": f"{i} " + "b" * 97} for i in range(3000)]))
    lines = [json.dumps({"question": f"{i} " + "c" * 40, "answer": "c" * 57}) for i in range(1200)]
    files[2].write_text("\n".join(lines))
    return [str(file) for file in files]


def test_several_sources_give_equal_shares_until_one_ends(tmp_path):
    files = _mixture(tmp_path)
    texts = [text for _, text in corpus(tmp_path, files).documents()]
    longest = max(map(len, texts))
    for cut in (40, len(texts) // 2, len(texts)):
        given = [sum(len(text) for text in texts[:cut] if letter in text) for letter in "abc"]
        assert max(given) - min(given) <= longest + 5 * cut  # and what separates a question from its answer
    assert "".join(texts).count("c") == 1200 * 97  # all of the one that is the least
    (question,) = [text for text in texts if text.startswith("7 c")]
    assert question == "7 " + "c" * 40 + "\n\n" + "c" * 57
    assert texts == [text for _, text in corpus(tmp_path, files).documents()]


def test_calibration_draws_from_all_sources(tmp_path):
    data = ready(corpus(tmp_path, _mixture(tmp_path), block_size=64, batch_size=8))
    text = data.tokenizer.decode(torch.cat([batch["input_ids"].flatten() for batch in data.calibration(60, seed=1)]))
    shares = [text.count(letter) / sum(text.count(one) for one in "abc") for letter in "abc"]
    assert min(shares) > 0.2
    assert data.name == "a.txt+b.json+c.jsonl"


def test_a_list_of_sources_has_its_inputs_and_its_key(tmp_path):
    files = _mixture(tmp_path)
    data = corpus(tmp_path, files[:2], val=files[2:])
    assert data.inputs() == [Path(file) for file in files]
    assert (
        corpus(tmp_path, files[:1], val=files[2]).source_key() == corpus(tmp_path, files[0], val=files[2]).source_key()
    )
    keys = [corpus(tmp_path, train).source_key() for train in (files[:2], files[1::-1], files)]
    assert all(keys.count(key) == 1 for key in keys)
    for field in ("train", "val"):
        with pytest.raises(ValueError, match=f"{field}: an empty list"):
            corpus(tmp_path, **{"train": files, field: []})


def test_a_list_can_be_given_on_the_command_line():
    parser = ArgumentParser()
    parser.add_class_arguments(TextCorpus, "data", skip={"kwargs"})
    for given, expected in (("[a.txt, b.json]", ["a.txt", "b.json"]), ("a.txt", "a.txt"), ("[a].txt", "[a].txt")):
        assert parser.parse_args([f"--data.train={given}"]).data.train == expected


def test_edited_file_is_prepared_again(tmp_path):
    file = tmp_path / "a.json"
    write(file, sentences(0, 100))
    first = ready(corpus(tmp_path, str(file))).describe()
    write(file, sentences(0, 120))
    second = ready(corpus(tmp_path, str(file))).describe()
    assert sum(second["documents"].values()) == 120
    assert second["hash"] != first["hash"]


def test_touched_file_and_other_split_make_another_key(tmp_path):
    import os

    file = write(tmp_path / "a.json", sentences(0, 100))
    key = corpus(tmp_path, file).source_key()
    assert corpus(tmp_path, file).source_key() == key
    assert corpus(tmp_path, file, val_percent=6).source_key() != key
    os.utime(file, ns=(0, 1))
    assert corpus(tmp_path, file).source_key() != key


def test_bad_record_is_named_and_nothing_is_left(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([*({"text": text} for text in sentences(0, 50)), {"txt": "?"}]))
    with pytest.raises(ValueError, match=r"a\.json: record 51 has no field 'text' \(its fields: txt\)"):
        corpus(tmp_path, str(file)).prepare_data()
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]


def test_empty_documents_are_passed_over(tmp_path):
    data = corpus(tmp_path, write(tmp_path / "a.json", ["", " \n", *sentences(0, 100)]))
    assert len(list(data.documents())) == 100


@pytest.mark.parametrize("field", ["train", "val"])
@pytest.mark.parametrize("source", ["nowhere.json", "./nowhere", "/nowhere/at/all"])
def test_missing_source_is_named_at_once(tmp_path, field, source):
    sources = {"train": write(tmp_path / "a.json", sentences(0, 9)), field: source}
    with pytest.raises(FileNotFoundError, match=f"{field}: no such file or folder: {source}"):
        corpus(tmp_path, **sources)


def test_val_percent_is_checked(tmp_path):
    with pytest.raises(ValueError, match="val_percent must be between 0 and 100"):
        corpus(tmp_path, write(tmp_path / "a.json", ["x"]), val_percent=0)


def test_hub_dataset_without_a_network(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*cannot be reached.*export_hub makes a file"):
        corpus(tmp_path, "nobody/nothing").prepare_data()


def test_hub_dataset(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return Dataset.from_dict({"title": ["T"] * 60, "text": sentences(len(split), 60)})

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    data = ready(corpus(tmp_path, "some/dataset", hub_config="en", val_split="test"))
    assert asked == [("some/dataset", "en", "test", True), ("some/dataset", "en", "train", True)]
    assert data.describe()["documents"] == {"val": 60, "train": 60}
    assert data.tokenizer.decode(data.train[0]["input_ids"]).startswith("T\n")
    assert data.name == "some--dataset"


def test_hub_dataset_problems_are_explained(tmp_path, monkeypatch):
    def fails(error):
        def load_dataset(*args, **kwargs):
            raise error

        monkeypatch.setattr(hub, "load_dataset", load_dataset)
        return corpus(tmp_path, "some/dataset", val_split="test")

    with pytest.raises(FileNotFoundError, match="no such file or folder here, and no such dataset on the Hub"):
        fails(DatasetNotFoundError("?")).prepare_data()
    with pytest.raises(ValueError, match=r"'some/dataset' \(config None, split test\): Unknown split"):
        fails(ValueError("Unknown split")).prepare_data()
    monkeypatch.setattr(hub, "load_dataset", lambda *args, **kwargs: [{"content": "no text"}])
    with pytest.raises(ValueError, match=r"val: some/dataset, row 1 has no field 'text' \(its fields: content\)"):
        corpus(tmp_path, "some/dataset", val_split="test").prepare_data()


@pytest.mark.skipif(not BOOKS.is_file(), reason="the books are not there (../shared)")
def test_a_real_book(tmp_path):
    data = ready(corpus(tmp_path, str(BOOKS), vocab_size=1024, block_size=128))
    described = data.describe()
    assert sum(described["documents"].values()) == 65
    assert sum(described["tokens"].values()) > 200_000
    assert "the" in data.tokenizer.decode(data.train[0]["input_ids"])


def test_many_files_of_long_names_fit_a_file_systems_name(tmp_path):
    files = [write(tmp_path / f"articles_of_a_long_name_part_{i:02d}.json", sentences(i, 20)) for i in range(12)]
    assert ready(corpus(tmp_path, files)).describe()["documents"]["train"] > 0
