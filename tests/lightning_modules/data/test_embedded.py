import subprocess
import sys
import time
from multiprocessing import get_context

import psutil
import pytest
from jsonargparse import ArgumentParser

from lightning_modules.data.base import TextDataModule
from lightning_modules.data.docstrings import docstrings_of, parse_folders, source_files, topics_of
from lightning_modules.data.embedded import EmbeddedDocs

SOURCE = b'''"""Module.

    Indented.
"""
class Thing:
    """A thing."""
    def act(self):
        """Act   now."""
    async def wait(self):
        "Wait \\d."
def silent():
    return """not a docstring"""
'''


@pytest.fixture
def package(tmp_path):
    for folder in ("pkg", "pkg/test", "pkg/sub"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            (tmp_path / folder / f"m{i}.py").write_text(f'"""{folder} {i} é \\ud800."""\n')
    (tmp_path / "pkg" / "broken.py").write_text("def (")
    return tmp_path / "pkg"


def test_docstrings_of_module_classes_and_functions():
    assert sorted(docstrings_of(SOURCE)) == ["A thing.", "Act   now.", "Module.\n\nIndented.", "Wait \\d."]


@pytest.mark.parametrize("source", [b"def (", b"\x00", b"print 'python 2'", b"# coding: nonsense\n'x'"])
def test_what_is_not_python_has_no_docstrings(source):
    assert docstrings_of(source) == []


def test_topics_are_the_strings_of_a_dictionary():
    assert topics_of(b"# made by hand\ntopics = {'a': 'one\\n  two', 'b': r'''three'''}\nother = 3\n") == [
        "one\ntwo",
        "three",
    ]


def test_parsing_does_not_depend_on_the_number_of_processes(package):
    one = list(parse_folders([package], 1))
    assert one == list(parse_folders([package], 3))
    assert len(one) == len(source_files([package])) == 9
    assert one[0] == [], "broken.py"
    assert [texts for texts in one if texts][-1] == ["pkg/sub 3 é ?."]


def test_parsing_can_be_left_early(package):
    texts = parse_folders([package], 2)
    next(texts)
    texts.close()


def test_parsers_end_when_their_reader_is_killed(tmp_path):
    for i in range(50):
        (tmp_path / f"m{i}.py").write_text(f'"""{"x" * 10_000}"""')  # more than a pipe holds, so that they must wait
    here, there = get_context("fork").Pipe()

    def read():
        texts = parse_folders([tmp_path], 2)
        next(texts)
        there.send([child.pid for child in psutil.Process().children()])
        time.sleep(60)

    reader = get_context("fork").Process(target=read)
    reader.start()
    children = [psutil.Process(pid) for pid in here.recv()]
    reader.kill()
    reader.join()
    assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_nothing_is_imported(tmp_path):
    (tmp_path / "m.py").write_text('"""Doc."""\nraise SystemExit("imported")\n')
    assert list(parse_folders([tmp_path], 1)) == [["Doc."]]


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    data = EmbeddedDocs(sources=["topics"], val_percent=10, cache_dir=cache, block_size=64, vocab_size=1000)
    data.prepare_data()
    data.setup("fit")
    return data


def test_topics_make_a_corpus(topics):
    described = topics.describe()
    assert described["name"] == "embedded"
    assert sum(described["documents"].values()) > 50
    assert described["vocab_size"] == 1000
    assert min(described["blocks"].values()) > 20
    assert sum(described["tokens"].values()) > 100_000
    assert "statement" in topics.tokenizer.decode(topics.train[:200]["input_ids"].flatten())


def test_documents_are_distinct_and_in_one_split_only(topics):
    documents = list(topics.documents())
    assert len({" ".join(text.split()) for _, text in documents}) == len(documents)
    assert {split for split, _ in documents} == {"train", "val"}
    assert min(len(text) for _, text in documents) >= 64
    assert documents == list(topics.documents())


def test_key_names_what_the_text_depends_on():
    key = EmbeddedDocs(sources=["torch", "topics"]).source_key()
    assert key == EmbeddedDocs(sources=["topics", "torch", "torch"]).source_key()
    assert set(key) == {"python", "torch", "sources", "val"}
    assert EmbeddedDocs(sources=["topics"]).source_key() != key


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"sources: \['numpy'\]; choose from"):
        EmbeddedDocs(sources=["numpy"])
    with pytest.raises(ValueError, match="sources: empty"):
        EmbeddedDocs(sources=[])
    with pytest.raises(ValueError, match="val_percent"):
        EmbeddedDocs(val_percent=100)


def test_all_arguments_are_on_the_command_line():
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextDataModule, "data")
    arguments = ["--data", "EmbeddedDocs", "--data.block_size", "64", "--data.sources", "[topics]"]
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert (data.block_size, data.sources) == (64, ["topics"])


def test_child_that_dies_is_reported(package, monkeypatch):
    real = subprocess.Popen

    def dies(command, **kwargs):
        return real([sys.executable, "-c", "raise SystemExit(3)"], **kwargs)

    monkeypatch.setattr("lightning_modules.data.docstrings.Popen", dies)
    with pytest.raises(RuntimeError, match="ended early at file 0"):
        list(parse_folders([package], 2))
