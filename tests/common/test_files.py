"""Writing folders and files: nothing lost at any moment, nothing damaged unnoticed, one writer at a time."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from common import files
from common.files import (
    DamagedError,
    InUseError,
    check_manifest,
    check_output,
    lock,
    recover,
    replacing,
    replacing_file,
)
from tests.conftest import ROOT


def _write(folder: Path, text: str, **options) -> None:
    with replacing(folder, "model", **options) as beside:
        (beside / "sub").mkdir()
        (beside / "sub/weights").write_text(text)
        (beside / "config.json").write_text("{}")


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
            _write(folder, text)
            assert _text(folder) == text
        assert [path.name for path in folder.parent.iterdir() if path.name[0] == "."] == []


def test_a_folder_of_somebody_elses_is_refused_and_overwritten_only_when_asked(tmp_path):
    folder = _thesis(tmp_path / "work")
    with pytest.raises(ValueError, match=r"^model\.output: .*work holds what Pare did not write \(thesis\.tex\)"):
        check_output(folder, "model.output")
    with pytest.raises(ValueError, match="thesis"):
        _write(folder, "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "thesis.tex"]
    with pytest.raises(ZeroDivisionError), replacing(folder, "model", overwrite=True):
        raise ZeroDivisionError
    assert (folder / "thesis.tex").read_text() == "ten years"
    _write(folder, "model", overwrite=True)
    assert _text(folder) == "model" and not (folder / "thesis.tex").exists()


def test_what_the_user_adds_to_pares_folder_is_the_users(tmp_path):
    _write(tmp_path / "model", "first")
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
        _write(tmp_path / folder, "weights")
    (tmp_path / "all/text.json").write_text("[]")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("base")
    for folder in (tmp_path / output, os.path.relpath(tmp_path / output)):
        with pytest.raises(ValueError, match=rf"output: .* {relation} the input"):
            check_output(folder, "output", [None, "hub/name", tmp_path / source], overwrite=True)
    with pytest.raises(ValueError, match="the input"):
        _write(tmp_path / output, "pruned", inputs=[tmp_path / source], overwrite=True)
    assert _text(tmp_path / "base") == "weights"


def test_a_sister_of_an_input_whose_name_merely_begins_alike_is_fine(tmp_path):
    _write(tmp_path / "base", "weights")
    check_output(tmp_path / "base-pruned", "output", [tmp_path / "base", "base-pruned"])


# ---- complete or not at all ----------------------------------------------------------------------------------------


def test_a_failure_keeps_the_old_one_and_leaves_nothing(tmp_path):
    _write(tmp_path / "model", "first")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "model", "model") as beside:
        (beside / "weights").write_text("half")
        raise ZeroDivisionError
    assert _text(tmp_path / "model") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_says_what_is_kept_and_what_to_do(error, tmp_path):
    _write(tmp_path / "model", "first")
    message = r"model \(the disk is full\); the earlier one is still there; make room in"
    with pytest.raises(OSError, match=message), replacing(tmp_path / "model", "model"):
        raise error


def test_a_failed_read_within_the_block_is_not_called_a_failed_write(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "model", "model"):
        (tmp_path / "elsewhere/input").read_text()


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
            with suppress(Killed):
                function()
        files._held.clear()  # the system does this for a process that died
        return dead

    return run


def test_killed_at_any_step_a_complete_folder_is_found(killed_at, tmp_path):
    found, step = [], 0
    while True:
        step += 1
        folder = tmp_path / str(step) / "last.ckpt"
        _write(folder, "old")
        dead = killed_at(step, lambda folder=folder: _write(folder, "new"))
        files.recover_all(folder.parent)
        check_manifest(folder)
        found.append(_text(folder))
        _write(folder, "next")  # and what was left behind is in nobody's way
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
    _write(tmp_path / "last.ckpt", "first")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "last.ckpt", "checkpoint"):
        raise ZeroDivisionError
    assert _text(tmp_path / "last.ckpt") == "first"


def test_a_writer_between_its_renames_is_left_alone(tmp_path):
    _write(tmp_path / "last.ckpt", "first")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    with _other_process(tmp_path / "last.ckpt"):
        recover(tmp_path / "last.ckpt")
        assert not (tmp_path / "last.ckpt").exists()
    recover(tmp_path / "last.ckpt")
    assert _text(tmp_path / "last.ckpt") == "first"


@pytest.mark.parametrize("name", [".model.partial", ".model.old"])
def test_a_folder_that_merely_has_a_leftovers_name_is_not_deleted(name, tmp_path):
    _write(tmp_path / "model", "first")
    _thesis(tmp_path / name)
    with pytest.raises(ValueError, match="in the way"):
        _write(tmp_path / "model", "second")
    assert (tmp_path / name / "thesis.tex").read_text() == "ten years" and _text(tmp_path / "model") == "first"


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


# ---- damage --------------------------------------------------------------------------------------------------------


def test_a_manifest_names_kind_and_every_file(tmp_path):
    _write(tmp_path / "model", "weights")
    manifest = check_manifest(tmp_path / "model")
    assert manifest == json.loads((tmp_path / "model/pare.json").read_text())
    assert manifest["pare"] == 1 and manifest["kind"] == "model" and manifest["ranks"] is None
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"config.json": 2, "sub/weights": 7}


def test_folders_without_a_manifest_pass(tmp_path):
    assert check_manifest(_thesis(tmp_path / "work")) is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "is not what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "6 bytes instead of 7"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_is_noticed_and_the_file_named(damage, message, tmp_path):
    _write(tmp_path / "model", "weights")
    damage(tmp_path / "model/sub/weights")
    with pytest.raises(DamagedError, match=rf"sub/weights .*{message}|sub/weights {message}"):
        check_manifest(tmp_path / "model")


def test_a_damaged_manifest_is_named(tmp_path):
    _write(tmp_path / "model", "weights")
    whole = (tmp_path / "model/pare.json").read_text()
    flipped = (whole.replace('"model"', '"nodel"'), whole.replace('"bytes": 7', '"bytes": 6'), whole[:-3])
    for text in ("", "{}", "[]", '{"pare": 1, "kind": "model", "files": {"a": 1}}', '{"pare": 1}', *flipped):
        (tmp_path / "model/pare.json").write_text(text)
        with pytest.raises(DamagedError, match=r"pare\.json is damaged"):
            check_manifest(tmp_path / "model")
        with pytest.raises(ValueError, match="did not write"):
            check_output(tmp_path / "model", "output")


def test_processes_can_share_the_check(tmp_path):
    _write(tmp_path / "model", "weights")
    _flip(tmp_path / "model/sub/weights")
    check_manifest(tmp_path / "model", part=(0, 2))  # config.json
    with pytest.raises(DamagedError, match="weights"):
        check_manifest(tmp_path / "model", part=(1, 2))


# ---- one writer ----------------------------------------------------------------------------------------------------

_HOLD = """
import sys
from common.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class _other_process:
    """Holds a lock in another process for as long as the block runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", _HOLD, str(self.path), "--my-run"], **pipes)
        assert self.process.stdout.readline() == b"held\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_a_second_writer_is_told_of_the_first(tmp_path):
    with _other_process(tmp_path / "run") as other:
        message = rf"run is being written by another run \(process {other.pid} on .* --my-run"
        with pytest.raises(InUseError, match=message), lock(tmp_path / "run"):
            pass
        with pytest.raises(InUseError, match=str(other.pid)):
            _write(tmp_path / "run", "second")
    with lock(tmp_path / "run"), lock(tmp_path / "run"):  # freed, and this process may take it again
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_lock(tmp_path):
    with _other_process(tmp_path / "run") as other:
        other.kill()
        other.wait()
    assert (tmp_path / ".run.lock").exists()
    _write(tmp_path / "run", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_card_may_be_edited_and_is_still_pares_to_replace(tmp_path):
    with replacing(tmp_path / "model", "model") as folder:
        (folder / "README.md").write_text("# model")
        (folder / "weights").write_text("1")
    (tmp_path / "model/README.md").write_text("# my model")
    check_manifest(tmp_path / "model")
    check_output(tmp_path / "model", "model.output")


def test_a_lock_is_not_inherited_by_children_that_outlive_the_holder(tmp_path):
    program = (
        "import os, sys, time; from common.files import lock\n"
        f"with lock({str(tmp_path / 'run')!r}):\n"
        "    child = os.fork()\n"
        "    time.sleep(60) if child == 0 else (print(child, flush=True), time.sleep(60))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(InUseError, match=str(process.pid)), lock(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with lock(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
