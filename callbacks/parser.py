"""The command line's errors: what is wrong, in one line, and where help is."""

import contextlib
import difflib
import inspect
import io
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import lightning.pytorch as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from callbacks.commands import PareTrainer
from common import moved
from common.front.screens import PROGRAM
from common.output import Refused
from common.variants import variants

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_UNKNOWN = re.compile(r"Expected a dot import path string: (\S+)")
# what jsonargparse tried besides, and what it was given
_NOISE = re.compile(
    r"(Does not validate against|Subtypes:|Errors:|Given value|Expected a path but|Expected a <class '[\w.]+'>$|"
    r"Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with)"
)


class Parser(LightningArgumentParser):
    """Says in one line what is wrong, and lists the known classes where one is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See ``ArgumentParser.error``; exits with status 2."""
        if not self.exit_on_error:  # a parser inside another: the outer one explains
            super().error(message, ex)
        parser: ArgumentParser = getattr(ex, "subcommand_parser", None) or self
        # `python -m bench` reads configurations of main.py, too
        program = parser.prog.replace(" [options]", "").replace("__main__.py", PROGRAM)
        told = explain(message, program.split()[-1]) + moved.hint(sys.argv)
        print(f"error: {told}\nhelp: {program} --help", file=sys.stderr)
        raise Refused(told)


@contextlib.contextmanager
def explained(parser: ArgumentParser) -> Iterator[None]:
    """Within the block, what a class refuses is an error of the command line."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(str(error), error)


def explain(message: str, command: str = "fit") -> str:
    """jsonargparse's message without what it tried in vain: the argument's whole name, and what is wrong with it.

    Args:
        message: It nests a parser's key and class in another's, a line each.
        command: The command whose arguments were read.
    """
    keys: list[str] = []
    classes: list[str] = []
    problems: list[str] = []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if key := _KEY.match(line):
            keys.append(key[1])
            line = line[key.end() :].strip()
        if found := _CLASS.match(line):
            classes.append(found[1])
        elif unknown := _UNKNOWN.search(line):
            problems.append(_unknown(unknown[1], keys, classes, command))
        elif line and not _NOISE.match(line):
            problems.append(line)
    where = ".".join(keys)
    return f"{where}: {'; '.join(dict.fromkeys(problems))}" if where else " ".join(problems)


def _unknown(name: str, keys: list[str], classes: list[str], command: str) -> str:
    """No class of this name: those there are, of the kind that the argument takes."""
    bases: list[type[object]] = _expected(keys[-1], classes[-1] if classes else None, command) if keys else []
    found: set[type[object]] = {each for base in bases for each in variants(base)}
    known = sorted(each.__name__ for each in found if not each.__name__.startswith("_"))
    if not known:
        return f"there is no class {name}"
    close = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {close[0]}?" if close else "."
    return f"there is no {' or '.join(base.__name__ for base in bases)} {name}{meant} There are: {', '.join(known)}"


def _expected(key: str, owner: str | None, command: str) -> list[type[object]]:
    """Base classes that an argument takes, by the annotation of the parameter."""
    if owner is None:
        top = {"model": L.LightningModule, "data": L.LightningDataModule}
        if key in top:
            return [top[key]]
        method = PareTrainer.__init__ if key.startswith("trainer.") else getattr(PareTrainer, command, None)
    else:
        module, _, name = owner.rpartition(".")
        method = getattr(sys.modules.get(module), name).__init__
    hint = typing.get_type_hints(inspect.unwrap(method)).get(key.rpartition(".")[2]) if method else None
    return [cls for cls in dict.fromkeys(_classes(hint)) if cls not in (str, int, float, bool, dict, type(None))]


def _classes(hint: Any) -> list[type[object]]:
    """All classes in an annotation."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return [hint]
    return [cls for part in typing.get_args(hint) for cls in _classes(part)]


def problem(program: Callable[[], None], arguments: Sequence[str]) -> str | None:
    """What a program says is wrong with arguments, or None; `check` and the arguments of a command try that command.

    Args:
        program: Reads ``sys.argv``, such as ``main.main``.
        arguments: What follows the program's name.
    """
    said = io.StringIO()
    before, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            program()
    except SystemExit as end:
        return said.getvalue().rpartition("error: ")[2].partition("\nhelp: ")[0].strip() if end.code else None
    except Exception as error:  # whatever a class raises is the answer
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv = before
    return None
