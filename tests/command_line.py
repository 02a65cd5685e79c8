"""The smallest run of `main.py`, and `main.py` on ranks that stay up: most of a small command is starting Python."""

import contextlib
import csv
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from tests.ranks import Ranks

ROOT = Path(__file__).parents[1]
# A model and corpus so small that starting Python is most of the time.
TINY = [
    *("--config", str(ROOT / "configs/pretraining/gpt2_tiny.yaml")),
    *(
        "--model.config",
        "{n_layer: 2, n_embd: 32, n_head: 2}",
        "--data.sources",
        "[topics]",
        "--data.vocab_size",
        "300",
    ),
    *("--data.block_size", "16", "--data.batch_size", "2", "--data.max_val_blocks", "9"),
    *("--model.warmup_steps", "3", "--trainer.val_check_interval", "6"),
]
LONG = ["--trainer.max_steps", "12", "--trainer.accumulate_grad_batches", "2", "--trainer.strategy.compressor", "Int8"]

# MKL promises the same bits in another process only under this setting, and with as many threads. Without it one run in
# about fifty of this tiny model was seen to differ from the others by the last bit of a loss.
REPRODUCIBLE = {"MKL_CBWR": "AVX2,STRICT", "OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for log in sorted(folder.glob("runs/gpt2_tiny/csv/version_*/metrics.csv")):
        with open(log, newline="") as file:
            found |= {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
    return found


def _on_this_rank(folder: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of a command here."""
    import main

    os.chdir(folder)
    said = io.StringIO()
    before, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            # what a new process shows: each warning once, none of those for developers
            warnings.simplefilter("default")
            for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", hidden)
            main.main()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


class Commands:
    """`main.py` on ranks that a launcher has started, as torchrun would; they stay up between commands."""

    def __init__(self, world_size: int = 2) -> None:
        self._ranks = Ranks(world_size, **REPRODUCIBLE)
        self._pids = self._ranks.run(os.getpid)

    def run(self, folder: Path, command: str, *arguments: str, base: Sequence[str] = TINY) -> str:
        """Run a command to its end; what rank 0 said."""
        codes, output = zip(*self._ranks.run(_on_this_rank, str(folder), [command, *base, *arguments]), strict=True)
        assert not any(codes), output
        return str(output[0])

    def interrupt(self, folder: Path, *arguments: str) -> None:
        """Start a run of 12 steps and end it with SIGTERM to one rank on the way."""
        ended = self._ranks.start(_on_this_rank, str(folder), ["fit", *TINY, *arguments])
        deadline = time.monotonic() + 120
        while not any(each.done() for each in ended) and len(losses(folder)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(self._pids[0], signal.SIGTERM)
        codes, output = zip(*self._ranks.end(ended), strict=True)
        assert codes == (128 + signal.SIGTERM,) * 2, output
        assert "continue with --ckpt_path" in output[0]
        assert 4 <= len(losses(folder)) < 12

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()
