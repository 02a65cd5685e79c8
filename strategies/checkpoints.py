"""Checkpoints that exist only when they are complete, and whose damage is noticed before anything is loaded.

A sharded checkpoint is a folder with a manifest (``common.manifest``). A checkpoint of one file is a zip archive, as
``torch.save`` writes; its manifest is the archive's comment, so that file and manifest cannot be parted.
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from common import files, manifest
from common.files import check_output, disk_full, recover, remove, start, swap
from common.locks import lock
from common.manifest import DamagedError, check_manifest

Gather = Callable[[Any], list[Any]]
"""Gives every rank what all ranks gave, in order of rank."""

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Application timeout caused pair closure")
"""What gloo says when another process of the group is gone."""

Doing = Literal["save", "load"]
_KEPT: dict[Doing, str] = {"save": "; an earlier one is untouched", "load": ""}
_END = b"PK\x05\x06"  # a zip archive's last record: 22 bytes, the last two are the length of the comment after it
_NO_HASH = "0" * 64


# ---- a folder that all ranks write to -------------------------------------------------------------------------------


@contextmanager
def replacing_together(path: Path, gather: Gather, rank: int) -> Iterator[Path]:
    """Yield a folder beside ``path`` for all ranks to write to; rank 0 puts it in place once every rank is done.

    A rank hashes the files that it has written itself: they are still in its machine's memory, the ranks work at the
    same time, and what one rank says about its files needs no second reading over a network file system.

    Args:
        path: The checkpoint's final folder.
        gather: See ``Gather``.
        rank: This process's rank.

    Raises:
        OSError: Writing failed on some rank; all ranks raise, and the message names path and rank.
        ValueError: There is a folder of somebody else's at ``path``.
    """
    with ExitStack() as held:
        with agreed(path, gather):
            if rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(path))
                _check_place(path)
                held.callback(remove, start(path, "checkpoint"))  # only what was made here, and while it is locked
        partial = files.partial_of(path)
        with agreed(path, gather) as mine:
            yield partial
            names = (name for name in manifest.names(partial) if _writer(name) == rank)
            mine.own = manifest.hashes(partial, names)
        with agreed(path, gather):
            if rank == 0:
                written = {name: entry for own in mine.all for name, entry in own.items()}
                manifest.write_manifest(partial, "checkpoint", written, ranks=len(mine.all))
                swap(partial, path)


class _Outcome:
    """What this rank tells the others, and once they have all spoken, what they told."""

    own: Any = None
    all: list[Any] = []  # noqa: RUF012 - replaced, never changed


@contextmanager
def agreed(path: Path, gather: Gather, doing: Doing = "save") -> Iterator[_Outcome]:
    """Run a block on every rank; when it fails on one, all raise the same error.

    torch's ``CheckpointException`` is a ``BaseException``, which nothing else would report.
    """
    outcome, failure, raised = _Outcome(), None, None
    try:
        yield outcome
    except (Exception, CheckpointException) as error:
        raised = error
        if peer_lost(error):  # who is gone answers no question
            raise lost(path, error, doing) from error
        said = next((kind for kind in (DamagedError, ValueError) if isinstance(error, kind)), None)
        failure = (said, disk_full(error), reason(error))
    try:
        told = gather((outcome.own, failure))
    except Exception as error:
        raise lost(path, error, doing) from error
    outcome.all = [own for own, _ in told]
    for other, (_, problem) in enumerate(told):
        if problem is not None:
            said, full, text = problem
            if said is not None:
                raise said(text) from raised
            use = "written to" if doing == "save" else "read"
            advice = f"make room in {path.parent}" if full else f"check that {path.parent} can be {use}"
            raise OSError(
                errno.ENOSPC if full else errno.EIO,
                f"could not {doing} the checkpoint {path} (rank {other}: {text}){_KEPT[doing]}; {advice}",
            ) from raised


def peer_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone."""
    return any(text in str(error) for text in _LOST_PEER)


def lost(path: Path | None, error: BaseException, doing: Doing) -> RuntimeError:
    """What to raise for such an error."""
    return RuntimeError(
        f"could not {doing} the checkpoint {path}: another rank is gone ({reason(error)}){_KEPT[doing]}"
    )


def at_fault(error: BaseException) -> BaseException:
    """The error itself; for torch's checkpoint errors, which carry tracebacks, that of the rank at fault."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def reason(error: BaseException) -> str:
    """One line for an error; see ``at_fault``."""
    error = at_fault(error)
    if disk_full(error):
        return "the disk is full"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _writer(name: str) -> int:
    """The rank that writes a file of a sharded checkpoint: ``__1_0.distcp``, ``compressor.rank1.pt``; else rank 0."""
    found = re.search(r"(?:__|\.rank)(\d+)[_.]", name)
    return int(found[1]) if found else 0


def _check_place(path: Path) -> None:
    """Refuse to replace a folder that is no checkpoint; one without a manifest has Lightning's ``meta.pt``."""
    check_output(path, "checkpoint", overwrite=not path.is_dir() or (path / "meta.pt").is_file())


def check_together(path: Path, gather: Gather, rank: int) -> None:
    """Look for damage before a checkpoint is loaded: the ranks share the files of a folder, rank 0 reads a single file.

    An earlier one that a killed save had moved aside gets its name back first.

    Raises:
        FileNotFoundError: On all ranks: there is no such checkpoint, at least on one.
        DamagedError: On all ranks, naming the first file that is missing, cut short or changed.
        OSError: On all ranks: one cannot read it.
    """
    with agreed(path, gather, "load") as found:
        if rank == 0:
            recover(path)
    ranks = len(found.all)
    with agreed(path, gather, "load") as found:
        found.own = path.exists()
        if path.is_dir():
            check_manifest(path, part=(rank, ranks))
        elif rank == 0 and found.own:
            check_seal(path)
    if not all(found.all):
        where = f", which other ranks see (rank {found.all.index(False)} does not): share it" if any(found.all) else ""
        raise FileNotFoundError(f"no checkpoint at {path}{where}; see the run's checkpoints folder")


# ---- a single file --------------------------------------------------------------------------------------------------


@contextmanager
def sealing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` for one process to write a zip archive to; sealed, it takes its place.

    Raises:
        ValueError: There is a folder of somebody else's at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path):
        _check_place(path)
        partial = start(path)
        try:
            yield partial
            seal(partial)
            swap(partial, path)
        finally:
            remove(partial)


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints of one file, complete or not at all, with a manifest that loading looks at."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See ``sealing`` and ``TorchCheckpointIO.save_checkpoint``.

        Raises:
            OSError: The file cannot be written; the message names it, says what is kept and what to do.
        """
        if "://" in str(path):  # not a file of this machine: nothing here can rename it
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with files.explained(Path(path)), sealing(Path(path)) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: Any = None
    ) -> Any:
        """See ``TorchCheckpointIO.load_checkpoint``.

        Raises:
            DamagedError: The file is cut short or changed.
        """
        if "://" not in str(path):
            recover(Path(path))
            if Path(path).is_file():
                check_seal(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def seal(path: Path) -> None:
    """Append a manifest to a zip archive, as its comment; the hash covers everything but itself."""

    def comment(digest: str) -> bytes:
        return json.dumps({"pare": 1, "kind": "checkpoint", "sha256": digest}).encode()

    with path.open("r+b") as file:
        file.seek(-2, 2)
        file.write(len(comment(_NO_HASH)).to_bytes(2, "little"))
        file.seek(0)
        found = hashlib.file_digest(file, "sha256")
        found.update(comment(_NO_HASH))
        file.seek(0, 2)
        file.write(comment(found.hexdigest()))
    manifest.sync(path)


def check_seal(path: Path) -> None:
    """Compare a file with the manifest at its end; one without passes.

    Raises:
        DamagedError: The file is cut short or changed.
    """
    damaged = DamagedError(f"{path} is not what was written: cut short, or changed; go on from another checkpoint")
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
        file.seek(0, 2)
        size = file.tell()
        file.seek(max(0, size - 1000))
        tail = file.read()
        at = tail.rfind(_END)
        if at < 0:
            if archive:
                raise damaged
            return  # what torch wrote before it wrote archives
        comment, length = tail[at + 22 :], int.from_bytes(tail[at + 20 : at + 22], "little")
        if length == len(comment) == 0:
            return  # not written by Pare, or before it sealed its files
        try:
            expected = json.loads(comment)["sha256"]
        except (ValueError, KeyError, TypeError):
            raise damaged from None
        found = hashlib.sha256()
        file.seek(0)
        left = size - len(comment)
        while left:
            block = file.read(min(left, 1 << 20))
            found.update(block)
            left -= len(block)
        found.update(comment.replace(expected.encode(), _NO_HASH.encode()))
    if found.hexdigest() != expected:
        raise damaged
