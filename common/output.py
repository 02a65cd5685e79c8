"""What a command prints: nothing that no user can act on, and nothing that could fail it."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


class _Steady:
    """A text stream whose writes cannot fail: once nobody reads on (closed pipe, full disk), they go nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")

    def write(self, text: str) -> int:
        """See ``io.TextIOBase.write``."""
        with self._lost_on_error():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """See ``io.IOBase.writelines``."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """See ``io.IOBase.flush``."""
        with self._lost_on_error():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What is still in the buffer is written again at exit, where it would fail once more: let it go nowhere.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Within the block, printing cannot raise, neither for a character that the terminal lacks nor for a closed pipe.

    Characters that cannot be encoded are replaced. Closed standard streams are opened to nowhere first, or the next
    file that is opened would take their place and receive what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Steady(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def quiet() -> None:
    """Hide third-party messages that no user can act on."""
    # "Try litlogger" is an advertisement that Lightning has no switch for.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    # torch warns about its own FSDP1 internals, and Lightning uses a name that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends are registered)")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks transformers by its old name
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")
