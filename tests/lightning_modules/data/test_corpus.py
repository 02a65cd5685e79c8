"""Which files of a folder are read, and what is said about the others."""

import pytest

from lightning_modules.data import source
from lightning_modules.data.corpus import find_corpus
from tests.lightning_modules.data.test_text import corpus


def write(path, text="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(root):
    return [str(file.relative_to(root)) for file in find_corpus(root).files]


def test_folder_is_read_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "a/z.json"):
        write(tmp_path / name)
    assert names(tmp_path) == ["a/z.json", "a.txt", "b.txt", "sub/c.txt"]


def test_hidden_names_and_other_kinds_are_left_out_and_named(tmp_path):
    for name in ("a.json", "._a.json", ".ipynb_checkpoints/a.json", "notes.pdf", "sub/.b.txt", "sub/b.txt"):
        write(tmp_path / name)
    found = find_corpus(tmp_path)
    assert names(tmp_path) == ["a.json", "sub/b.txt"]
    assert found.left_out == [
        ("._a.json", "hidden"),
        (".ipynb_checkpoints", "hidden"),
        ("notes.pdf", "of another kind"),
        ("sub/.b.txt", "hidden"),
    ]
    assert found.remark() == "3 hidden (._a.json, .ipynb_checkpoints, sub/.b.txt); 1 of another kind (notes.pdf)"


def test_links_are_followed_once_and_without_cycles(tmp_path):
    root, outside = tmp_path / "corpus", tmp_path / "outside"
    write(root / "a.txt")
    write(outside / "b.txt")
    write(outside / "deep" / "c.txt")
    (root / "linked").symlink_to(outside)
    (root / "linked_again").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (outside / "deep" / "up").symlink_to(root)
    (root / "same.txt").symlink_to(root / "a.txt")
    (root / "gone.txt").symlink_to(root / "nowhere.txt")
    found = find_corpus(root)
    assert names(root) == ["a.txt", "linked/b.txt", "linked/deep/c.txt"]
    assert dict(found.left_out) == {
        "gone.txt": "links to nothing",
        "linked/deep/up": "under another name already",
        "linked_again": "under another name already",
        "loop": "under another name already",
        "same.txt": "under another name already",
    }
    assert "(linked/deep/up, linked_again, loop, …)" in found.remark()


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    write(tmp_path / ".cache" / "a.txt")
    assert names(tmp_path / ".cache") == ["a.txt"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file that can be read in this folder"):
        find_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"unknown kind of file '\.pdf'"):
        find_corpus(write(tmp_path / "a.pdf", "x"))
    with pytest.raises(ValueError, match=r"no file .*; it has 1 of another kind \(a\.pdf\)"):
        find_corpus(tmp_path)
    with pytest.raises(ValueError, match="file is empty"):
        find_corpus(write(tmp_path / "a.json", ""))


def test_data_say_what_they_leave_out(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(source, "rank_zero_info", said.append)
    write(tmp_path / "texts" / "a.txt")
    write(tmp_path / "texts" / "._a.txt")
    corpus(tmp_path, str(tmp_path / "texts"))
    assert said == [f"train: not read of {tmp_path / 'texts'}: 1 hidden (._a.txt)"]
