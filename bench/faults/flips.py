"""A flipped bit in a random place of what Pare reads back: is it noticed, and is the file named?"""

import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


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
        target = chance.choice([path for path in files if path.stat().st_size])
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
