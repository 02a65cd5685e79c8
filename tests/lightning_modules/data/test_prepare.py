"""Preparation: what it writes, and what is left after it was killed, refused or run twice at once."""

import logging
import os
import resource
import signal
import time
import traceback
from multiprocessing import get_context

import pytest
from lightning_utilities.core import rank_zero

from lightning_modules.data.cache import cache_root
from tests.lightning_modules.data.toy import Toy, hold_up, sentences


def start(cache, hold_at, first=lambda: None):
    """A forked process that prepares (see ``toy.hold_up``); what it says is in ``cache/said.PID``."""
    process = get_context("fork").Process(target=_prepare, args=(cache, hold_at, first))
    process.start()
    return process


def _prepare(cache, hold_at, first):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = cache / f"said.{os.getpid()}"
    tell = said.open("a", buffering=1).write
    rank_zero.log.handlers[:] = [logging.StreamHandler(said.open("a"))]
    first()
    try:
        data = hold_up(cache, hold_at)
        data.prepare_data()
        data.setup("fit")
        tell(f"blocks {data.describe()['blocks']}")
    except BaseException as error:
        tell("".join(traceback.format_exception_only(error)))
        raise SystemExit(1) from None


def said(cache, process):
    return (cache / f"said.{process.pid}").read_text()


def wait_for(condition, process):
    while not condition():
        assert process.is_alive(), process
        time.sleep(0.02)


def kill(process):
    process.kill()
    process.join()


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
    kill(process)
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
    kill(dead)
    Toy(cache_dir=str(tmp_path), documents=101).prepare_data()
    assert not list(root.glob("*/**/.*.partial*"))


def test_what_merely_looks_like_leftovers_is_not_deleted(tmp_path):
    """The cache may lie in a folder that holds other things, as with ``cache_dir: .`` and a ``data`` of one's own."""
    mine = cache_root(str(tmp_path)) / "mine" / "sub"
    mine.mkdir(parents=True)
    (mine / ".thesis.partial").write_text("ten years")
    (mine.parent / ".thesis.partial.tex").write_text("ten years")
    Toy(cache_dir=str(tmp_path)).prepare_data()
    assert (mine / ".thesis.partial").exists() and (mine.parent / ".thesis.partial.tex").exists()
    assert {path.name for path in mine.parent.iterdir()} == {"sub", ".thesis.partial.tex"}


def test_two_preparations_at_once_do_the_work_once(tmp_path):
    first = start(tmp_path, "rows")
    wait_for((tmp_path / "here").exists, first)
    second = start(tmp_path, "nowhere")
    wait_for((tmp_path / f"said.{second.pid}").exists, second)
    wait_for(lambda: "Waiting for another process that prepares" in said(tmp_path, second), second)
    (tmp_path / "go").touch()
    first.join()
    second.join()
    one, other = (said(tmp_path, process) for process in (first, second))
    assert (first.exitcode, second.exitcode) == (0, 0), one + other
    assert one.splitlines()[-1] == other.splitlines()[-1] and "blocks {" in one
    assert (tmp_path / "log").read_text() == "read\n"


def test_interrupt_leaves_only_finished_stages(tmp_path):
    process = start(tmp_path, "blocks")
    wait_for((tmp_path / "here").exists, process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1 and "KeyboardInterrupt" in said(tmp_path, process)
    (folder,) = (path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"pare.json", "rows", "tokenizer", "val"}
    assert list((folder / "val").iterdir()) == []


def test_full_disk_is_explained_and_leaves_nothing(tmp_path):
    # A limit on file size is met like a full disk: by a failing write in the middle.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    process = start(tmp_path, "nowhere", limit)
    process.join()
    assert process.exitcode == 1
    err = said(tmp_path, process)
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
    assert not list(cache_root(str(tmp_path)).iterdir()), "mended text is another cache, and nobody wants this one"


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
