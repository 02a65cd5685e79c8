"""`completion SHELL`: a script with which a shell completes `pare`, made by shtab from the screens of help."""

from argparse import ArgumentParser
from importlib.util import find_spec
from typing import Any

from common.front import screens, starters

_ALL = ("--help", "--help_all", *(option.split()[0] for option, _ in screens.OUTPUT_FORMS))


def script(arguments: list[str]) -> str:
    """The script.

    Args:
        arguments: What follows `completion`: the shell.

    Raises:
        RefusedError: There is no such shell, or no shtab.
    """
    if find_spec("shtab") is None:
        raise starters.RefusedError("completion needs shtab: pip install shtab")
    import shtab

    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        raise starters.RefusedError(f"give a shell: {', '.join(shtab.SUPPORTED_SHELLS)}")
    return str(shtab.complete(parser(), arguments[0]))


def parser() -> ArgumentParser:
    """The commands with the options that their screens show; it parses nothing."""
    import shtab

    whole: Any = ArgumentParser("pare", add_help=False)
    whole.add_argument("--help", action="store_true")
    commands = whole.add_subparsers()
    places = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY, "FOLDER:": shtab.DIRECTORY}
    choices = {"--task": [*starters.tasks()], "--command": [*screens.COMMANDS]}
    for name, told in screens.COMMANDS.items():
        one = commands.add_parser(name, help=told.does, add_help=False)
        own = [*told.options, *(screens.COMMON if told.common else ())]
        seen = set()
        for option, means in own:
            flag, *value = option.replace(",", "").replace("=", " ").split() or [""]
            if not flag.startswith("--") or flag.endswith(".NAME") or flag in seen:
                continue
            seen.add(flag)
            action: Any = one.add_argument(flag, help=means.replace("%", "%%"), choices=choices.get(flag))
            if value and value[0] in places:
                action.complete = places[value[0]]
        for flag in _ALL:
            one.add_argument(flag, action="store_true")
        if name == "init":
            folder: Any = one.add_argument("folder")
            folder.complete = shtab.DIRECTORY
        if name == "completion":
            one.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return whole
