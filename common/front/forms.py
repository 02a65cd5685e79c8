"""The forms in which a command answers: `--json` and `--quiet`, wherever they stand on the line."""

import difflib
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from common.output import one_object


@dataclass(frozen=True)
class Forms:
    """How a command was asked to answer.

    Attributes:
        json: By one JSON object on standard output, everything else on standard error.
        quiet: Without progress and tables.
    """

    json: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, arguments: list[str]) -> "tuple[Forms, list[str]]":
        """The forms among arguments, and the arguments without them; what follows `--` is another command's."""
        end = arguments.index("--") if "--" in arguments else len(arguments)
        own, others = arguments[:end], arguments[end:]
        forms = cls("--json" in own, "--quiet" in own)
        return forms, [*(word for word in own if word not in ("--json", "--quiet")), *others]

    def words(self) -> list[str]:
        """The forms as arguments."""
        return [*(["--json"] if self.json else []), *(["--quiet"] if self.quiet else [])]

    def tell(self, command: str, result: Any) -> int:
        """Print what a command that has ended well found: its text, or the object with it."""
        if not self.json:
            print(result)
            return 0
        with one_object(command) as answer:
            answer["result"] = result
        return 0

    def refuse(self, command: str, told: str, more: str, status: int = 2) -> int:
        """Say what is wrong with arguments, and where help is.

        Args:
            command: What was asked for.
            told: What is wrong.
            more: The command line that helps.
            status: The exit status, which is returned.
        """
        print(f"error: {told}\nhelp: {more}", file=sys.stderr)
        if self.json:
            with one_object(command) as answer:
                answer["status"], answer["error"] = status, told
        return status


def unknown(command: str, known: Collection[str]) -> str:
    """What to say of a command that there is not, or that was not given."""
    if not command:
        return f"give a command. There are: {', '.join(known)}"
    close = difflib.get_close_matches(command, known, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"there is no command {command}; {meant}There are: {', '.join(known)}"
