"""Preparation: what it writes, and what is left after it was killed, refused or run twice at once."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules.data.cache import cache_root
from tests.lightning_modules.data.toy import Toy, sentences

ROOT = Path(__file__).parents[3]


def start(cache, hold_at, **popen):
    command = [sys.executable, "-m", "tests.lightning_modules.data.toy", str(cache), str(cache / "log"), hold_at]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def blocks(data):
    data.prepare_data()
    data.setup("fit")
    return data.train[:]["input_ids"].tolist(), data.val[:]["input_ids"].tolist()


@pytest.mark.parametrize("characters", [500, 1 << 20])  # text of a block may lie in two chunks
def test_blocks_hold_exactly_the_documents_with_an_end_of_text_after_each(tmp_path, monkeypatch, characters):
    monkeypatch.setattr("lightning_modules.data.rows.CHUNK", characters)
    data = Toy(cache_dir=str(tmp_path))
    train, val = blocks(data)
    documents = sentences(0, 200)
    for rows, expected in ((train, [d for i, d in enumerate(documents) if i % 10]), (val, documents[::10])):
        text = data.tokenizer.decode([token for row in rows for token in row])
        whole = "<|endoftext|>".join([*expected, ""])
        assert whole.startswith(text)
        assert {len(row) for row in rows} == {16}
    described = data.describe()
    assert described["documents"] == {"val": 20, "train": 180}
    assert described["blocks"] == {"val": len(val), "train": len(train)}
    for split, rows in (("train", train), ("val", val)):
        assert described["tokens"][split] == len(rows) * 16 + described["dropped_tokens"][split]
        assert described["dropped_tokens"][split] < 16


def test_result_does_not_depend_on_the_number_of_processors(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.data.rows.CHUNK", 500)  # many chunks to mix up
    one, four = (Toy(cache_dir=str(tmp_path / str(n)), num_proc=n) for n in (1, 4))
    assert blocks(one) == blocks(four)
    assert one.describe() == four.describe()


def test_second_start_reads_nothing_and_leaves_no_working_files(tmp_path):
    log = tmp_path / "log"
    first = blocks(Toy(cache_dir=str(tmp_path), log=str(log)))
    assert blocks(Toy(cache_dir=str(tmp_path), log=str(log))) == first
    assert log.read_text() == "read\n"
    (folder,) = (path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"pare.json", "tokenizer", "train", "val"}


def test_everything_that_matters_makes_another_cache(tmp_path):
    for change in ({}, {"documents": 201}, {"block_size": 17}, {"vocab_size": 301}, {"batch_size": 2, "num_proc": 1}):
        Toy(cache_dir=str(tmp_path), **change).prepare_data()
    assert len([path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir()]) == 4


@pytest.mark.parametrize("hold_at, reads", [("rows", 2), ("tokenizer", 1), ("blocks", 1)])
def test_killed_preparation_is_taken_up_again(tmp_path, hold_at, reads):
    process = start(tmp_path, hold_at)
    wait_for((tmp_path / "here").exists, process)
    process.kill()
    process.communicate()
    root = cache_root(str(tmp_path))
    assert list(root.glob("*/**/.*.partial*"))
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        Toy(cache_dir=str(tmp_path)).setup("fit")

    resumed = blocks(Toy(cache_dir=str(tmp_path), log=str(tmp_path / "log")))
    assert (tmp_path / "log").read_text().count("read") == reads
    assert resumed == blocks(Toy(cache_dir=str(tmp_path / "fresh")))
    assert not list(root.glob("*/**/.*.partial*"))


def test_leftovers_of_a_dead_preparation_of_other_data_are_removed_and_living_ones_kept(tmp_path):
    dead = start(tmp_path, "rows")
    wait_for((tmp_path / "here").exists, dead)
    root = cache_root(str(tmp_path))
    Toy(cache_dir=str(tmp_path), documents=100).prepare_data()
    assert list(root.glob("*/**/.*.partial*")), "it still lives, and its files are its own"
    dead.kill()
    dead.communicate()
    Toy(cache_dir=str(tmp_path), documents=101).prepare_data()
    assert not list(root.glob("*/**/.*.partial*"))


def test_two_preparations_at_once_do_the_work_once(tmp_path):
    first = start(tmp_path, "rows")
    wait_for((tmp_path / "here").exists, first)
    second = start(tmp_path, "nowhere")
    line = second.stderr.readline()
    while line and "Waiting for another process" not in line:
        line = second.stderr.readline()
    assert line, "the second never waited for the first"
    (tmp_path / "go").touch()
    (out, err), (out2, err2) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (0, 0), err + err2
    assert out == out2
    assert (tmp_path / "log").read_text() == "read\n"


def test_interrupt_leaves_only_finished_stages(tmp_path):
    process = start(tmp_path, "blocks")
    wait_for((tmp_path / "here").exists, process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    (folder,) = (path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"rows", "tokenizer", "val"}
    assert list((folder / "val").iterdir()) == []


def test_full_disk_is_explained_and_leaves_nothing(tmp_path):
    # A limit on file size is met like a full disk: by a failing write in the middle.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    process = start(tmp_path, "nowhere", preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "ValueError: cache_dir: cannot write the prepared data below" in err
    assert "make room and start again (what is finished is kept), or set cache_dir" in err
    assert not [path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir()]


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cache_dir: cannot write"):
        Toy(cache_dir=str(tmp_path / "file" / "cache")).prepare_data()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cache_dir: cannot write"):
        Toy(cache_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("change, message", [
    ({"documents": 2, "block_size": 500}, r"val: the corpus has \d+ tokens, less than one block of 500; set"),
    ({"documents": 30, "block_size": 4000}, r"val: the corpus has"),
    ({"documents": 1}, "train: no usable document; give more text"),
])  # fmt: skip
def test_too_little_text(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Toy(cache_dir=str(tmp_path), **change).prepare_data()
    with pytest.raises(ValueError, match=message):  # and again, from what is finished
        Toy(cache_dir=str(tmp_path), **change).prepare_data()


def test_error_in_the_source_is_passed_on_and_leaves_nothing(tmp_path):
    data = Toy(cache_dir=str(tmp_path))

    def documents():
        yield "train", "some text"
        raise ValueError("corpus.json: record 2 has no field 'text'")

    data.documents = documents
    with pytest.raises(ValueError, match=r"corpus\.json: record 2"):
        data.prepare_data()
    assert not [path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir()]
    assert blocks(Toy(cache_dir=str(tmp_path)))


def test_a_training_document_that_validates_is_left_out(tmp_path):
    data = Toy(cache_dir=str(tmp_path))
    shared = sentences(1, 10)
    data.documents = lambda: [("val", text) for text in shared] + [("train", t) for t in [*shared, *sentences(2, 10)]]
    data.prepare_data()
    data.setup("fit")
    assert data.describe()["documents"] == {"val": 10, "train": 10}
    train = data.tokenizer.decode(data.train[:]["input_ids"].flatten())
    assert not any(text in train for text in shared)
