"""Pare's command line: python main.py COMMAND --config configs/….yaml

Commands: fit, validate, test, predict, prepare, prune, verify, export, generate.

`fit --print_config=skip_default` shows a configuration; `--model.help NAME`, `--trainer.strategy.compressor.help NAME`
show what a class takes.
"""

import logging
import warnings
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import callbacks
import lightning_modules  # noqa: F401 - imported classes are known by their short names
import strategies  # noqa: F401
from callbacks.commands import PareTrainer
from strategies.compressors import known_compressors


class Parser(LightningArgumentParser):
    """Names the known compressors when one is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See ``ArgumentParser.error``."""
        if "compressor" in message:
            message += "\nKnown compressors: " + ", ".join(c.__name__ for c in known_compressors())
        super().error(message, ex)


class PareCLI(LightningCLI):
    """LightningCLI with more subcommands; configurations choose every class."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """See ``LightningCLI.subcommands``."""
        own = ("prepare", "prune", "verify", "export", "generate")
        return LightningCLI.subcommands() | {command: {"model", "datamodule"} for command in own}

    def check_arguments(self) -> None:
        """Let the module refuse what cannot succeed before any text or weight is read."""
        check = getattr(self.model, "check_arguments", None)
        if check is not None:
            check(self.subcommand, self.datamodule)

    before_fit = before_validate = before_test = before_predict = check_arguments
    before_prune = before_verify = before_export = check_arguments


def quiet() -> None:
    """Hide third-party messages that no user can act on."""
    # "Try litlogger" is an advertisement that Lightning has no switch for.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    # torch warns about its own FSDP1 internals, and Lightning uses a name that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends are registered)")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks transformers by its old name
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")


def main() -> None:
    """Run the command line."""
    quiet()
    PareCLI(
        trainer_class=PareTrainer,
        parser_class=Parser,
        save_config_callback=callbacks.LogConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [callbacks.Progress(), callbacks.GracefulStop()]},
        auto_configure_optimizers=False,
        seed_everything_default=1234,
    )


if __name__ == "__main__":
    main()
