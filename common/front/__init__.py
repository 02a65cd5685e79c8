"""What the command line answers without importing torch: help, mistyped commands, starter configurations."""

import contextlib
import sys

from common import moved
from common.front import completion, screens, starters
from common.front.forms import Forms, unknown

HELP = ("-h", "--help")
HELP_ALL = "--help_all"


def answer(arguments: list[str]) -> int | list[str]:
    """Answer what needs neither torch nor Lightning, whose import takes seconds.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit status; or the arguments to run, where that takes more.
    """
    forms, words = Forms.of(arguments)
    if not words:
        if not forms.json:
            print(screens.overview(), file=sys.stderr)
            return 2
        return forms.refuse("", unknown("", screens.COMMANDS), f"{screens.PROGRAM} --help")
    first, *rest = words
    if first in HELP:
        print(screens.overview())
        return 0
    if HELP_ALL in words:
        return [HELP[1] if word == HELP_ALL else word for word in words]
    if first.startswith("-"):
        return arguments
    if first not in screens.COMMANDS:
        told = unknown(first, screens.COMMANDS) + moved.hint(words)
        return forms.refuse(first, told, f"{screens.PROGRAM} --help")
    if any(word in HELP for word in rest):
        print(screens.screen(first))
        return 0
    if first not in ("init", "completion"):
        return arguments
    try:
        if first == "init":
            with contextlib.redirect_stdout(sys.stderr) if forms.json else contextlib.nullcontext():
                return [*starters.command(rest), *forms.words()]
        script = completion.script(rest)
    except (starters.RefusedError, OSError) as error:
        return forms.refuse(first, str(error), f"{screens.PROGRAM} {first} --help")
    return forms.tell(first, script)
