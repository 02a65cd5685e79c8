"""The command line behind `main.py`: LightningCLI with Pare's commands, and the forms in which it answers."""

import sys
from typing import Any

from lightning.pytorch.cli import LightningCLI

import callbacks
import lightning_modules  # noqa: F401 - imported classes are known by their short names
import strategies  # noqa: F401
from callbacks.commands import PareTrainer
from callbacks.control import TunesControls
from callbacks.graceful_stop import stoppable
from callbacks.parser import Parser, explained
from callbacks.push import Push, left
from common.front.forms import Forms
from common.front.screens import COMMANDS
from common.output import one_object, silent, steady

# What `common.front` answers.
_WITHOUT = ("init", "completion")


class PareCLI(TunesControls):
    """LightningCLI with more subcommands; configurations choose every class."""

    def __init__(self, *, args: Any = None, **options: Any) -> None:
        given = sys.argv[1:] if args is None else args
        words = [given["subcommand"]] if isinstance(given, dict) else given
        self._asked = self.subcommands().keys() & set(words)  # a value may be named like a command
        super().__init__(args=args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """See ``LightningCLI.subcommands``."""
        known = LightningCLI.subcommands()
        own = [name for name in COMMANDS if name not in known and name not in _WITHOUT]
        return known | {command: {"model", "datamodule"} for command in own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """See ``LightningCLI._prepare_subcommand_parser``: most of parsing is to find the arguments of all commands."""
        if subcommand in self._asked:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """See ``LightningCLI.add_arguments_to_parser``: what every command takes."""
        parser.add_argument(
            "--push",
            type=str | None,
            default=None,
            help="Upload the folder that the command leaves, when it is complete, to this repository of the Hugging "
            "Face Hub: OWNER/NAME. A private one is made where there is none.",
        )

    def instantiate_classes(self) -> None:
        """See ``LightningCLI.instantiate_classes``; what a class refuses is an error of the command line."""
        with explained(self.parser):
            super().instantiate_classes()
            self._push = self._to_push()

    def check_arguments(self) -> None:
        """See ``PareTrainer.check_arguments``."""
        chosen = self.config_init[self.subcommand]
        with explained(self.parser):
            parts = (self.model, self.datamodule)
            ckpt_path = self.trainer.check_arguments(str(self.subcommand), *parts, chosen.get("ckpt_path"))
            if "ckpt_path" in chosen:
                chosen["ckpt_path"] = ckpt_path

    before_validate = before_test = before_predict = check_arguments
    before_prune = before_calibrate = before_verify = before_export = before_evaluate = check_arguments

    def check(self, **arguments: Any) -> None:
        """See ``PareTrainer.check``."""
        with explained(self.parser):
            self.trainer.check(**arguments)

    def _to_push(self) -> Push | None:
        """What ``push`` asks for.

        Raises:
            ValueError: The command leaves nothing to upload, or see ``Push``.
        """
        chosen = self.config_init[self.subcommand]
        command = chosen.get("command", str(self.subcommand))  # `check` is told another
        if chosen.get("push") is None:
            return None
        if chosen.get("dry_run") or self.trainer.fast_dev_run:
            raise ValueError("push: a trial run leaves nothing to upload; leave push out")
        folder = left(command, self.trainer.callbacks, self.model)
        if folder is None:
            raise ValueError(f"push: {command} leaves no folder to upload with this configuration; leave push out")
        return Push(chosen["push"], folder)

    def push(self) -> None:
        """Upload what the command left, where ``push`` asks for it; the first rank does."""
        if self._push is not None and self.trainer.is_global_zero:
            print(f"uploading {self._push.folder}", flush=True)
            print(f"uploaded: {self._push.upload()}", flush=True)

    after_fit = after_prune = after_calibrate = after_export = push


def run(arguments: list[str]) -> None:
    """Run a command.

    Args:
        arguments: What follows the program's name. ``--json`` and ``--quiet``, wherever they stand, say how it answers;
            they are for this process alone, not for ranks that it starts.
    """
    forms, arguments = Forms.of(arguments)
    # Lightning starts further ranks with what it finds here
    sys.argv = [sys.argv[0], *arguments]
    with steady(), stoppable():
        if forms.json:
            with one_object(arguments[0]) as answer, silent(forms.quiet):
                answer["result"] = started().trainer.result()
        else:
            # what `generate` prints is what was asked for
            with silent(forms.quiet, stdout=arguments[:1] != ["generate"]):
                started()


def started(cls: type[PareCLI] = PareCLI, arguments: list[str] | None = None) -> PareCLI:
    """The command line at its end, in a process that is ``steady`` and ``stoppable``.

    Args:
        cls: Another kind of it.
        arguments: In place of the process's own.
    """
    return cls(
        args=arguments,
        trainer_class=PareTrainer,
        parser_class=Parser,
        save_config_callback=callbacks.LogConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [callbacks.Progress(), callbacks.GracefulStop(), callbacks.RunFolders()]},
        auto_configure_optimizers=False,
        seed_everything_default=1234,
    )
