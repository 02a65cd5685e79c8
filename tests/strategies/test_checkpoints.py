"""Checkpoints: whole or not at all, damage noticed before loading, and errors that say what happened."""

import errno
import json
import multiprocessing
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from common.locks import lock
from common.manifest import DamagedError
from strategies.checkpoints import (
    SealedCheckpointIO,
    check_seal,
    check_together,
    replacing_together,
)
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.engine import fitting
from tests.strategies.engines import fit


def alone(told):
    return [told]


def _save(path, text, fails=None, gather=alone):
    with replacing_together(path, gather, 0) as beside:
        (beside / "meta.pt").write_text(text)
        if fails is not None:
            raise fails


def test_a_new_checkpoint_replaces_the_old_one(tmp_path):
    path = tmp_path / "deeper" / "last.ckpt"
    for text in ("first", "second"):
        _save(path, text)
        assert (path / "meta.pt").read_text() == text
        assert list(path.parent.iterdir()) == [path]
    manifest = json.loads((path / "pare.json").read_text())
    assert manifest["kind"] == "checkpoint" and manifest["ranks"] == 1 and list(manifest["files"]) == ["meta.pt"]


_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("unexpected pos 704 vs 598"), r"last\.ckpt \(rank 0: the disk is full\).*; make room in"),
        (CheckpointException("save", {1: (_FULL, None)}), r"last\.ckpt \(rank 0: the disk is full\).*; make room in"),
        (CheckpointException("save", {1: (TypeError("no\npickle"), None)}), r"rank 0: no\).*can be written to"),
        (PermissionError(errno.EACCES, "Permission denied"), r"Permission denied.*can be written to"),
    ],
)
def test_failure_keeps_the_old_one_and_says_why(error, message, tmp_path):
    path = tmp_path / "last.ckpt"
    _save(path, "first")
    with pytest.raises(OSError, match=message):
        _save(path, "second", error)
    assert (path / "meta.pt").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_another_ranks_failure_is_this_ones_too(tmp_path):
    told_by = iter([None, (None, True, "the disk is full")])  # rank 1's outcome of each step
    with pytest.raises(OSError, match=r"rank 1: the disk is full.*make room"):
        _save(tmp_path / "last.ckpt", "first", gather=lambda told: [told, (None, next(told_by))])
    assert list(tmp_path.iterdir()) == []


def _gone(told):
    raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize("where", ["writing", "agreeing"])
def test_a_ranks_death_is_not_called_a_full_disk(where, tmp_path):
    calls = iter([alone, _gone])
    failure = RuntimeError("Connection reset by peer") if where == "writing" else None
    with pytest.raises(RuntimeError, match="another rank is gone") as caught:
        _save(tmp_path / "last.ckpt", "first", failure, gather=lambda told: next(calls)(told))
    assert "room" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    path = tmp_path / "last.ckpt"
    _save(path, "first")
    for leftover in (".last.partial.ckpt", ".last.ckpt.old"):
        shutil.copytree(path, tmp_path / leftover)
    _save(path, "second")
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_save_leaves_what_another_run_or_somebody_else_has_beside(tmp_path):
    path, beside = tmp_path / "last.ckpt", tmp_path / ".last.partial.ckpt"
    beside.mkdir()
    (beside / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match="is in the way"):
        _save(path, "first")
    assert (beside / "thesis.tex").read_text() == "ten years"
    (beside / "thesis.tex").rename(beside / "pare.json")  # Pare's own: of a run that is writing
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=_hold, args=(path, theirs))
    other.start()
    try:
        assert ours.recv() == "locked"
        with pytest.raises(ValueError, match="is being written by another run"):
            _save(path, "second")
        assert (beside / "pare.json").read_text() == "ten years"
    finally:
        ours.send("done")
        other.join()


def _hold(path, pipe):
    with lock(path):
        pipe.send("locked")
        pipe.recv()


def test_somebody_elses_folder_is_refused_and_lightnings_checkpoint_replaced(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match="thesis"):
        _save(path, "first")
    (path / "thesis.tex").rename(path / "meta.pt")
    _save(path, "first")
    assert (path / "meta.pt").read_text() == "first"


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ([(None, None), (True, (None, False, "Input/output error"))], OSError, r"load .*rank 1: Input.*can be read"),
        ([(None, (None, False, "Stale file handle")), None], OSError, r"load .*rank 1: Stale file handle"),
        ([(None, None), (True, (DamagedError, False, "x is missing"))], DamagedError, "^x is missing"),
        ([(None, None), (False, None)], FileNotFoundError, r"no checkpoint at .*last\.ckpt, which .*rank 1 does not"),
    ],
)
def test_what_another_rank_cannot_read_is_this_ones_trouble_too(answers, kind, message, tmp_path):
    path, told_by = tmp_path / "last.ckpt", iter(answers)
    _save(path, "first")
    with pytest.raises(kind, match=message):
        check_together(path, lambda told: [told, next(told_by)], 0)


def test_what_this_rank_cannot_read_is_told_to_the_others(tmp_path, monkeypatch):
    path, heard = tmp_path / "last.ckpt", []
    _save(path, "first")
    unreadable = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("strategies.checkpoints.check_manifest", lambda *_, **__: (_ for _ in ()).throw(unreadable))
    with pytest.raises(OSError, match="could not load the checkpoint"):
        check_together(path, lambda told: heard.append(told) or [told], 0)
    assert len(heard) == 2 and "Input/output error" in heard[1][1][2]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RuntimeError("size mismatch for weight\nand more"),
            ValueError,
            r"does not fit this model \(size mismatch for",
        ),
        (CheckpointException("load", {1: (ValueError("Size mismatch"), None)}), ValueError, r"model \(Size mismatch\)"),
        (CheckpointException("load", {1: (OSError("Stale file handle"), None)}), OSError, "^Stale file handle"),
        (RuntimeError("Connection closed by peer"), RuntimeError, "could not load the checkpoint .*rank is gone"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "^CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "^DefaultCPUAllocator"),
    ],
)
def test_only_what_does_not_fit_is_said_not_to_fit(error, kind, message):
    with pytest.raises(kind, match=message) as caught, fitting(Path("last.ckpt")):
        raise error
    assert type(caught.value) is kind


# ---- one file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "last.ckpt"
    SealedCheckpointIO().save_checkpoint({"weights": torch.arange(40.0), "step": 3}, path)
    return path


def test_a_sealed_file_loads_like_any_other(sealed):
    check_seal(sealed)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(sealed, weights_only=True, **options)
        assert loaded["step"] == 3 and torch.equal(loaded["weights"], torch.arange(40.0))
    assert SealedCheckpointIO().load_checkpoint(sealed)["step"] == 3
    assert list(sealed.parent.iterdir()) == [sealed]


def test_a_flipped_bit_anywhere_in_a_sealed_file_is_noticed(sealed):
    content = sealed.read_bytes()
    for at in [*range(0, len(content), 7), *range(len(content) - 30, len(content))]:
        sealed.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(DamagedError, match=r"last\.ckpt"):
            check_seal(sealed)


def test_a_sealed_file_that_is_cut_short_is_noticed(sealed):
    content = sealed.read_bytes()
    for size in [*range(4, len(content), 50), len(content) - 1]:
        sealed.write_bytes(content[:size])
        with pytest.raises(DamagedError, match=r"last\.ckpt"):
            SealedCheckpointIO().load_checkpoint(sealed)


def test_files_without_a_seal_pass(tmp_path):
    torch.save({"step": 3}, tmp_path / "plain.ckpt")
    torch.save({"step": 3}, tmp_path / "ancient.ckpt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert SealedCheckpointIO().load_checkpoint(path)["step"] == 3


def test_a_failed_file_keeps_the_old_one(sealed, monkeypatch):
    monkeypatch.setattr("strategies.checkpoints.seal", lambda path: (_ for _ in ()).throw(_FULL))
    with pytest.raises(OSError, match=r"the disk is full.*make room"):
        SealedCheckpointIO().save_checkpoint({"step": 4}, sealed)
    assert torch.load(sealed, weights_only=True)["step"] == 3 and list(sealed.parent.iterdir()) == [sealed]


# ---- through the engines -------------------------------------------------------------------------------------------

KINDS = [("fsdp1", "sharded"), ("fsdp1", "full"), ("fsdp2", "sharded"), ("fsdp2", "full"), ("ddp", None)]
METHOD = ErrorFeedback(Int8())


def _loaded(path, options):
    """The last step after resuming, or why not."""
    try:
        return fit(METHOD, ckpt_path=str(path), steps=3, **options)["step"]
    except (DamagedError, FileNotFoundError) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize(("engine", "kind"), KINDS)
def test_damage_is_named_on_all_ranks_before_anything_is_loaded(engine, kind, two_ranks, tmp_path):
    options = {"engine": engine, **({"state_dict_type": kind} if kind else {})}
    whole, path = tmp_path / "whole/last.ckpt", tmp_path / "last.ckpt"
    two_ranks.run(fit, METHOD, folder=str(whole), **options)
    files = sorted(whole.rglob("*")) if whole.is_dir() else [whole]
    if whole.is_dir():
        names = {file.name for file in files}
        assert {".metadata", "meta.pt", "compressor.rank0.pt", "compressor.rank1.pt", "pare.json"} < names
        assert json.loads((whole / "pare.json").read_text())["ranks"] == 2
    for file in files:
        copy = shutil.copytree if whole.is_dir() else shutil.copyfile
        copy(whole, path)
        damaged = path / file.relative_to(whole)
        content = damaged.read_bytes()
        ends = (-180, -135, -20) if whole.is_file() else ()  # an archive's directory: torch would stumble over it
        for at in (len(content) // 3, *ends):
            flipped = bytearray(content)
            flipped[at] ^= 0x21
            damaged.write_bytes(flipped)
            for found in two_ranks.run(_loaded, path, options):
                assert found.startswith("DamagedError") and str(damaged) in found
        if file.name.startswith(("compressor", "__1")):
            damaged.unlink()
            assert all("is missing" in found for found in two_ranks.run(_loaded, path, options))
        shutil.rmtree(path) if whole.is_dir() else path.unlink()
    assert two_ranks.run(_loaded, whole, options) == [3, 3]


@pytest.mark.parametrize(("engine", "kind"), KINDS)
def test_a_checkpoint_that_was_moved_aside_is_found(engine, kind, two_ranks, tmp_path):
    options = {"engine": engine, **({"state_dict_type": kind} if kind else {})}
    path = tmp_path / "last.ckpt"
    two_ranks.run(fit, METHOD, folder=str(path), **options)
    path.rename(tmp_path / ".last.ckpt.old")  # killed between the two renames
    assert two_ranks.run(_loaded, path, options) == [3, 3]


def test_sharded_checkpoints_from_before_manifests_load(two_ranks, tmp_path):
    path, options = tmp_path / "last.ckpt", {"engine": "fsdp2"}
    two_ranks.run(fit, METHOD, folder=str(path), **options)
    (path / "pare.json").unlink()
    assert two_ranks.run(_loaded, path, options) == [3, 3]


def _full_disk(path, engine, kind):
    """Save under a limit on file sizes on rank 1 alone, which is met like a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1 or kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        fit(METHOD, folder=path, engine=engine, state_dict_type=kind)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    return "saved"


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_a_full_disk_is_named_on_all_ranks_and_gets_its_space_back(engine, kind, two_ranks, tmp_path):
    path = tmp_path / "checkpoints/last.ckpt"
    for message in two_ranks.run(_full_disk, str(path), engine, kind):
        assert f"could not save the checkpoint {path}" in message and "make room" in message
    assert list(path.parent.iterdir()) == []
