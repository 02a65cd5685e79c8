"""Pare's command line: python main.py COMMAND --config configs/….yaml, or where Pare is installed: pare COMMAND …

Commands: fit, validate, test, predict, check, prepare, prune, calibrate, verify, export, generate.

`check` says what is wrong with a configuration without running it. `fit --print_config=skip_default` shows one;
`--model.help NAME`, `--trainer.strategy.compressor.help NAME` show what a class takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.cli import LightningCLI

import callbacks
import lightning_modules  # noqa: F401 - imported classes are known by their short names
import strategies  # noqa: F401
from callbacks.commands import PareTrainer
from callbacks.graceful_stop import stoppable
from callbacks.parser import Parser
from common.output import quiet, steady


class PareCLI(LightningCLI):
    """LightningCLI with more subcommands; configurations choose every class."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """See ``LightningCLI.subcommands``."""
        own = ("check", "prepare", "prune", "calibrate", "verify", "export", "generate")
        return LightningCLI.subcommands() | {command: {"model", "datamodule"} for command in own}

    def instantiate_classes(self) -> None:
        """See ``LightningCLI.instantiate_classes``; what a class refuses is an error of the command line."""
        with self._explained():
            super().instantiate_classes()

    def check_arguments(self) -> None:
        """See ``PareTrainer.check_arguments``."""
        chosen = self.config_init[self.subcommand]
        with self._explained():
            parts = (self.model, self.datamodule)
            ckpt_path = self.trainer.check_arguments(str(self.subcommand), *parts, chosen.get("ckpt_path"))
            if "ckpt_path" in chosen:
                chosen["ckpt_path"] = ckpt_path

    before_fit = before_validate = before_test = before_predict = check_arguments
    before_prune = before_calibrate = before_verify = before_export = check_arguments

    def check(self, **arguments: Any) -> None:
        """See ``PareTrainer.check``."""
        with self._explained():
            self.trainer.check(**arguments)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            self.parser.error(str(error), error)


def main() -> None:
    """Run the command line."""
    quiet()
    with steady(), stoppable():
        PareCLI(
            trainer_class=PareTrainer,
            parser_class=Parser,
            save_config_callback=callbacks.LogConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [callbacks.Progress(), callbacks.GracefulStop(), callbacks.RunFolders()]},
            auto_configure_optimizers=False,
            seed_everything_default=1234,
        )


if __name__ == "__main__":
    main()
