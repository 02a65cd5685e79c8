"""What the command line answers without importing torch: help, mistyped commands, starter configurations."""

import difflib
import sys

from common import moved
from common.front import completion, screens, starters

HELP = ("-h", "--help")
HELP_ALL = "--help_all"


def answer(arguments: list[str]) -> int | list[str]:
    """Answer what needs neither torch nor Lightning, whose import takes seconds.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit status; or the arguments to run, where that takes more.
    """
    if not arguments:
        print(screens.overview(), file=sys.stderr)
        return 2
    first, *rest = arguments
    if first in HELP:
        print(screens.overview())
        return 0
    if HELP_ALL in arguments:
        return [HELP[1] if word == HELP_ALL else word for word in arguments]
    if first.startswith("-"):
        return arguments
    if first not in screens.COMMANDS:
        close = difflib.get_close_matches(first, screens.COMMANDS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        known = ", ".join(screens.COMMANDS)
        told = f"there is no command {first}; {meant}There are: {known}{moved.hint(arguments)}"
        print(f"error: {told}\nhelp: {screens.PROGRAM} --help", file=sys.stderr)
        return 2
    if any(word in HELP for word in rest):
        print(screens.screen(first))
        return 0
    if first == "completion":
        return completion.command(rest)
    return starters.command(rest) if first == "init" else arguments
