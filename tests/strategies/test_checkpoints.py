import pytest

from strategies.checkpoints import replace_when_complete


def _save(path, text, rank=0):
    with replace_when_complete(path, lambda: None, rank) as beside:
        beside.mkdir()
        (beside / "weights").write_text(text)
        if text == "fails":
            raise RuntimeError("unexpected pos 704 vs 598")


def test_a_new_checkpoint_replaces_the_old_one(tmp_path):
    path = tmp_path / "deeper" / "last.ckpt"
    for text in ("first", "second"):
        _save(path, text)
        assert (path / "weights").read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_failure_keeps_the_old_one_and_names_the_place(tmp_path):
    path = tmp_path / "last.ckpt"
    _save(path, "first")
    with pytest.raises(OSError, match=r"last\.ckpt .*unexpected pos.*Make room"):
        _save(path, "fails")
    assert (path / "weights").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    path = tmp_path / "last.ckpt"
    (tmp_path / ".last.ckpt.partial").mkdir()
    (tmp_path / ".last.ckpt.old").mkdir()
    _save(path, "first")
    assert list(tmp_path.iterdir()) == [path]
