"""Pare's command line: python main.py COMMAND --config configs/….yaml, or where Pare is installed: pare COMMAND …

Commands: fit, validate, test, predict, check, prepare, prune, calibrate, verify, export, evaluate, generate.

`check` says what is wrong with a configuration without running it. `fit --print_config=skip_default` shows one;
`--model.help NAME`, `--trainer.strategy.compressor.help NAME` show what a class takes.
"""

from typing import Any

from lightning.pytorch.cli import LightningCLI

import callbacks
import lightning_modules  # noqa: F401 - imported classes are known by their short names
import strategies  # noqa: F401
from callbacks.commands import PareTrainer
from callbacks.control import TunesControls
from callbacks.graceful_stop import stoppable
from callbacks.parser import Parser, explained
from common.output import quiet, steady


class PareCLI(TunesControls):
    """LightningCLI with more subcommands; configurations choose every class."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """See ``LightningCLI.subcommands``."""
        own = ("check", "prepare", "prune", "calibrate", "verify", "export", "evaluate", "generate")
        return LightningCLI.subcommands() | {command: {"model", "datamodule"} for command in own}

    def instantiate_classes(self) -> None:
        """See ``LightningCLI.instantiate_classes``; what a class refuses is an error of the command line."""
        with explained(self.parser):
            super().instantiate_classes()

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


def run(cls: type[PareCLI] = PareCLI, arguments: list[str] | None = None) -> PareCLI:
    """Run the command line, or ``arguments`` in its place."""
    quiet()
    with steady(), stoppable():
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


def main() -> None:
    """Run the command line."""
    run()


if __name__ == "__main__":
    main()
