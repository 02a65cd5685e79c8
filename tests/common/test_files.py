"""Writing folders and files: nothing lost at any moment."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common import files, locks, manifest
from common.files import check_output, recover, replacing, replacing_file
from common.manifest import check_manifest
from tests.common.writers import other_process, write


def _thesis(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("ten years")
    return folder


def _text(folder: Path) -> str:
    return (folder / "sub/weights").read_text()


# ---- what may be written -------------------------------------------------------------------------------------------


def test_nothing_an_empty_folder_and_pares_own_result_may_be_written(tmp_path):
    for folder in (tmp_path / "new/deep", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        check_output(folder, "output")
        for text in ("first", "second"):
            write(folder, text)
            assert _text(folder) == text
        assert [path.name for path in folder.parent.iterdir() if path.name[0] == "."] == []


def test_a_folder_of_somebody_elses_is_refused_and_overwritten_only_when_asked(tmp_path):
    folder = _thesis(tmp_path / "work")
    with pytest.raises(ValueError, match=r"^model\.output: .*work holds what Pare did not write \(thesis\.tex\)"):
        check_output(folder, "model.output")
    with pytest.raises(ValueError, match="thesis"):
        write(folder, "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "thesis.tex"]
    with pytest.raises(ZeroDivisionError), replacing(folder, "model", overwrite=True):
        raise ZeroDivisionError
    assert (folder / "thesis.tex").read_text() == "ten years"
    write(folder, "model", overwrite=True)
    assert _text(folder) == "model" and not (folder / "thesis.tex").exists()


def test_what_the_user_adds_to_pares_folder_is_the_users(tmp_path):
    write(tmp_path / "model", "first")
    (tmp_path / "model/sub/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"sub/notes\.txt"):
        check_output(tmp_path / "model", "output")


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match=r"^output: .*model is a file that exists"):
        check_output(tmp_path / "model", "output")
    with pytest.raises(ValueError, match="no folder that you may write to"):
        check_output(tmp_path / "model/deeper", "output")


@pytest.mark.parametrize(
    ("output", "source", "relation"),
    [
        ("base", "base", "is"),
        ("base/pruned", "base", "lies inside"),
        ("all", "all/base", "contains"),
        ("all", "all/text.json", "contains"),
        ("link", "base", "is"),
        ("x/../base", "base", "is"),
    ],
)
def test_an_input_is_refused_even_with_overwrite(output, source, relation, tmp_path):
    for folder in ("base", "all/base"):
        write(tmp_path / folder, "weights")
    (tmp_path / "all/text.json").write_text("[]")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("base")
    for folder in (tmp_path / output, os.path.relpath(tmp_path / output)):
        with pytest.raises(ValueError, match=rf"output: .* {relation} the input"):
            check_output(folder, "output", [None, "hub/name", tmp_path / source], overwrite=True)
    with pytest.raises(ValueError, match="the input"):
        write(tmp_path / output, "pruned", inputs=[tmp_path / source], overwrite=True)
    assert _text(tmp_path / "base") == "weights"


def test_a_sister_of_an_input_whose_name_merely_begins_alike_is_fine(tmp_path):
    write(tmp_path / "base", "weights")
    check_output(tmp_path / "base-pruned", "output", [tmp_path / "base", "base-pruned"])


# ---- complete or not at all ----------------------------------------------------------------------------------------


def test_a_failure_keeps_the_old_one_and_leaves_nothing(tmp_path):
    write(tmp_path / "model", "first")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "model", "model") as beside:
        (beside / "weights").write_text("half")
        raise ZeroDivisionError
    assert _text(tmp_path / "model") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_says_what_is_kept_and_what_to_do(error, tmp_path):
    write(tmp_path / "model", "first")
    message = r"model \(the disk is full\); the earlier one is still there; make room in"
    with pytest.raises(OSError, match=message), replacing(tmp_path / "model", "model"):
        raise error


def test_a_failed_read_within_the_block_is_not_called_a_failed_write(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "model", "model"):
        (tmp_path / "elsewhere/input").read_text()


@pytest.mark.parametrize(("name", "reason"), [
    ("model", "denied"), (".model.partial/weights", "denied"), (".model.lock", "denied"), (".", "denied"),
    ("base/config.json", None), ("models", None), (".modest.partial", None),
])  # fmt: skip
def test_a_refusal_is_told_from_a_neighbour_that_cannot_be_read(name, reason, tmp_path):
    error = PermissionError(errno.EACCES, "denied", str(tmp_path / name))
    assert files.write_refused(error, tmp_path / "model") == reason
    assert files.write_refused(OSError(errno.ENOSPC, "full", str(tmp_path / name)), tmp_path / "model")


def test_a_device_that_fails_may_have_failed_to_read(tmp_path):
    assert files.write_refused(OSError(errno.EIO, "I/O error"), tmp_path) is None
    assert files.write_refused(OSError(errno.EIO, "I/O error", str(tmp_path)), tmp_path) == "I/O error"


class Killed(BaseException):
    """Stands for SIGKILL: what follows does not run."""


@pytest.fixture
def killed_at(monkeypatch):
    """Runs a function that is killed at its n-th rename, deletion or sync; what tidies up afterwards does not run."""

    def run(step: int, function) -> bool:
        count, dead = 0, False

        def guard(original):
            def wrapper(*arguments, **keywords):
                nonlocal count, dead
                count += 1
                if dead or count == step:
                    dead = True
                    raise Killed
                return original(*arguments, **keywords)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", guard(Path.rename))
            patch.setattr(Path, "replace", guard(Path.replace))
            patch.setattr(Path, "unlink", guard(Path.unlink))
            patch.setattr(shutil, "rmtree", guard(shutil.rmtree))
            patch.setattr(files, "sync", guard(files.sync))
            patch.setattr(manifest, "sync", guard(manifest.sync))
            with suppress(Killed):
                function()
        locks._held.clear()  # the system does this for a process that died
        return dead

    return run


def test_killed_at_any_step_a_complete_folder_is_found(killed_at, tmp_path):
    found, step = [], 0
    while True:
        step += 1
        folder = tmp_path / str(step) / "last.ckpt"
        write(folder, "old")
        dead = killed_at(step, lambda folder=folder: write(folder, "new"))
        files.recover_all(folder.parent)
        check_manifest(folder)
        found.append(_text(folder))
        write(folder, "next")  # and what was left behind is in nobody's way
        assert _text(folder) == "next"
        assert [path.name for path in folder.parent.iterdir() if path.name != ".last.ckpt.lock"] == ["last.ckpt"]
        if not dead:
            break
    assert found == sorted(found, reverse=True)  # first the old one, from some step on the new one
    assert {"old", "new"} == set(found) and step > 8


def test_killed_at_any_step_a_file_is_the_old_or_the_new(killed_at, tmp_path):
    path, found, dead, step = tmp_path / "plan.json", [], True, 0
    while dead:
        step += 1
        files.write_text(path, "old")
        dead = killed_at(step, lambda: files.write_text(path, "new"))
        found.append(path.read_text())
    assert found[0] == "old" and found[-1] == "new" and step > 2


def test_the_only_copy_is_put_back_not_deleted(tmp_path):
    write(tmp_path / "last.ckpt", "first")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "last.ckpt", "checkpoint"):
        raise ZeroDivisionError
    assert _text(tmp_path / "last.ckpt") == "first"


def test_a_writer_between_its_renames_is_left_alone(tmp_path):
    write(tmp_path / "last.ckpt", "first")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    with other_process(tmp_path / "last.ckpt"):
        recover(tmp_path / "last.ckpt")
        assert not (tmp_path / "last.ckpt").exists()
    recover(tmp_path / "last.ckpt")
    assert _text(tmp_path / "last.ckpt") == "first"


@pytest.mark.parametrize("name", [".model.partial", ".model.old"])
def test_a_folder_that_merely_has_a_leftovers_name_is_not_deleted(name, tmp_path):
    write(tmp_path / "model", "first")
    _thesis(tmp_path / name)
    with pytest.raises(ValueError, match="in the way"):
        write(tmp_path / "model", "second")
    assert (tmp_path / name / "thesis.tex").read_text() == "ten years" and _text(tmp_path / "model") == "first"


def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path):
    """safetensors gives them to their owner alone, so that nobody else could serve an exported model."""
    with replacing(tmp_path / "model", "model") as folder:
        save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with replacing_file(tmp_path / "one.safetensors") as path:
        save_file({"w": torch.zeros(1)}, path)
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    for name in ("model/model.safetensors", "one.safetensors"):
        assert (tmp_path / name).stat().st_mode == wanted


def test_files_keep_mode_suffix_and_the_link_to_them(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link.html").symlink_to(path)
    with replacing_file(tmp_path / "link.html") as beside:
        assert beside.suffix == ".html" and beside.parent == tmp_path
        beside.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ZeroDivisionError), replacing_file(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["link.html", "page.html"]


def test_where_a_volume_is_mounted_nothing_can_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(
        ValueError, match=f"model.output: {tmp_path} is where a volume is mounted.* choose a folder in it"
    ):
        check_output(tmp_path, "model.output")
    check_output(tmp_path / "within", "model.output")
