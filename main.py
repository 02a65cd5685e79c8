"""Pare's command line: python main.py COMMAND --config configs/….yaml, or where Pare is installed: pare COMMAND …

Commands: init, check, fit, validate, test, predict, prepare, prune, calibrate, verify, export, evaluate, generate.

Without arguments, and with `--help`, it shows them on one screen; `COMMAND --help` is a screen for one, `COMMAND
--help_all` names every argument, `--model.help NAME`, `--trainer.strategy.compressor.help NAME` those of a class.
"""

import sys

from common import front
from common.output import quiet, steady


def main() -> None:
    """Run the command line; see docs/commands.md for what it prints and how it ends."""
    with steady():
        answer = front.answer(sys.argv[1:])
    if isinstance(answer, int):
        sys.exit(answer)
    quiet()
    from callbacks.command_line import run  # imports torch and Lightning, which takes seconds

    run(answer)


if __name__ == "__main__":
    main()
