"""Folders written by Pare, and another process that writes, for the tests of both."""

import subprocess
import sys
from pathlib import Path

from common.files import replacing


def write(folder: Path, text: str, **options) -> None:
    """Write a folder of two files; ``options`` are those of ``replacing``."""
    with replacing(folder, "model", **options) as beside:
        (beside / "sub").mkdir()
        (beside / "sub/weights").write_text(text)
        (beside / "config.json").write_text("{}")


_HOLD = """
import sys
from common.locks import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class other_process:
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
