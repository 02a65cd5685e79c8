"""A flipped bit in a random place of what Pare reads back: is it noticed, and is the file named?

Model cards are left out: nothing reads them but people, who may edit them.
"""

import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.manifest import CARD, check_manifest
from common.records import record
from lightning_modules.loading import load, load_tokenizer
from lightning_modules.structured_pruning.plan import PruningPlan
from lightning_modules.token_pruning.store import Saliency
from strategies.checkpoints import SealedCheckpointIO, check_together


@dataclass(frozen=True)
class Artifact:
    """Something that Pare wrote and reads back.

    Attributes:
        kind: What it is, for records.
        path: File or folder.
        load: Reads it as the product does; raises when it is damaged.
    """

    kind: str
    path: Path
    load: Callable[[Path], object]


@dataclass(frozen=True)
class Flip:
    """One flipped bit.

    Attributes:
        kind: Of the artifact.
        file: Name of the file within it.
        byte: Place in the file.
        bit: Place in the byte.
        said: The error's message; empty when there was none.
        noticed: Whether there was an error that names the file.
    """

    kind: str
    file: str
    byte: int
    bit: int
    said: str
    noticed: bool

    def line(self) -> dict:
        """For records."""
        return asdict(self)


def artifacts(folder: Path) -> list[Artifact]:
    """What the undisturbed runs of the scenarios left in a folder, and how each is read.

    Raises:
        FileNotFoundError: A scenario has not run.
    """
    trained, pruned, sparse = (folder / name for name in ("CompressedFSDP", "prune_structure", "prune_blocks"))
    found = [
        Artifact("sharded checkpoint", trained / "runs/faults/checkpoints/last.ckpt", check_sharded),
        Artifact("checkpoint", folder / "CompressedDDP/runs/faults/checkpoints/last.ckpt", check_checkpoint),
        Artifact("model", trained / "runs/model", check_model),
        Artifact("cache", next((folder / "prepare/cache/data").glob("*/")), check_manifest),
        Artifact("records", trained / "runs/results.jsonl", check_records),
        Artifact("saliency", folder / "predict/runs/saliency", lambda path: Saliency(path, {})),
        Artifact("pruned model", pruned / "runs/pruned", check_model),
        Artifact("plan", pruned / "runs/pruned/pruning_plan.json", PruningPlan.load),
        Artifact("sparse model", sparse / "runs/pruned", check_model),
        Artifact("packed model", folder / "pack_blocks/runs/packed", check_model),
    ]
    missing = [str(one.path) for one in found if not one.path.exists()]
    if missing:
        raise FileNotFoundError(f"nothing at {', '.join(missing)}: run the scenarios first")
    return found


def check_sharded(path: Path) -> None:
    """What every engine does before it loads a sharded checkpoint."""
    check_together(path, lambda value: [value], rank=0)


def check_checkpoint(path: Path) -> None:
    """Load a checkpoint of one file."""
    SealedCheckpointIO().load_checkpoint(path)


def check_model(path: Path) -> None:
    """Load model and tokenizer."""
    load(path)
    load_tokenizer(path)


def check_records(path: Path) -> None:
    """Read records as tables and reports do.

    Raises:
        ValueError: Lines were passed over.
    """
    _, broken = record.read(path)
    if broken:
        raise ValueError(record.passed_over(path, broken))


def all_flips(artifacts: Sequence[Artifact], count: int, seed: int) -> list[Flip]:
    """Flip ``count`` bits, one at a time and each in a fresh copy, the artifacts in turn."""
    chance = random.Random(seed)
    return [flip(artifacts[number % len(artifacts)], chance) for number in range(count)]


def flip(artifact: Artifact, chance: random.Random) -> Flip:
    """Flip a bit in a random place of a copy and load the copy."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / artifact.path.name
        if artifact.path.is_dir():
            shutil.copytree(artifact.path, copy)
        else:
            shutil.copy(artifact.path, copy)
        files = sorted(path for path in (copy.rglob("*") if copy.is_dir() else [copy]) if path.is_file())
        target = chance.choice([path for path in files if path.stat().st_size and path.name != CARD])
        content = bytearray(target.read_bytes())
        byte, bit = chance.randrange(len(content)), chance.randrange(8)
        content[byte] ^= 1 << bit
        target.write_bytes(content)
        try:
            artifact.load(copy)
        except (ValueError, OSError, RuntimeError) as error:
            said = str(error)
        else:
            said = ""
        return Flip(artifact.kind, target.name, byte, bit, said, target.name in said)
