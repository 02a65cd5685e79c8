"""What a command prints: nothing that no user can act on, and nothing that could fail it."""

import contextlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from common.progress import QUIET


class Refused(SystemExit):
    """Arguments or a configuration were refused; status 2.

    Attributes:
        told: What is wrong with them.
    """

    def __init__(self, told: str) -> None:
        super().__init__(2)
        self.told = told


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
    """Hide third-party messages that no user can act on. Some come while packages are imported: call it before."""
    # "Try litlogger", "try litmodels": advertisements that Lightning has no switch for.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "seamless" not in r.getMessage())
    # Where it is installed peft imports torchao, which has libraries that a CPU build of torch cannot load.
    logging.getLogger("torchao").addFilter(lambda r: not r.getMessage().startswith("Failed to load"))
    logging.getLogger("torch.utils._pytree").addFilter(lambda r: "Enum subclass" not in r.getMessage())
    # torch warns about its own FSDP1 internals, and Lightning uses a name that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends are registered)")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks transformers by its old name
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")


@contextlib.contextmanager
def one_object(command: str) -> Iterator[dict[str, Any]]:
    """Within the block standard output is standard error, also for processes started there; then one JSON object.

    It has ``command``, ``status`` (the exit status), ``result`` (what the block put there, values of JSON) and
    ``error`` (null, or what went wrong). Of several ranks the first prints it.

    Args:
        command: Name of what is run.
    """
    answer: dict[str, Any] = {"command": command, "status": 0, "result": None, "error": None}
    try:
        with _standard_output(sys.stderr):
            yield answer
    except BaseException as error:
        answer["status"], answer["error"] = _status(error), _told(error)
        raise
    finally:
        if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
            print(json.dumps(answer, ensure_ascii=False, allow_nan=False), flush=True)


@contextlib.contextmanager
def silent(on: bool = True, stdout: bool = True) -> Iterator[None]:
    """Within the block no progress is shown, also by processes started there; warnings and errors are.

    Args:
        on: Whether to do anything.
        stdout: Whether standard output goes nowhere, too.
    """
    if not on:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    loggers.append(logging.getLogger("lightning.pytorch.utilities.rank_zero"))
    levels = [logger.level for logger in loggers]
    os.environ[QUIET] = "1"
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, _standard_output(nowhere) if stdout else contextlib.nullcontext():
            yield
    finally:
        del os.environ[QUIET]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _standard_output(stream: Any) -> Iterator[None]:
    """Within the block, standard output is another file: to this program, libraries in C, and child processes."""
    sys.stdout.flush()
    kept, before = os.dup(1), sys.stdout
    os.dup2(stream.fileno(), 1)
    sys.stdout = stream
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before
        os.dup2(kept, 1)
        os.close(kept)


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) else int(code is not None)


def _told(error: BaseException) -> str | None:
    told = getattr(error, "told", None)
    if told is not None or (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
        return told
    return f"{type(error).__name__}: {error}"
