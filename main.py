"""Pare's command line: python main.py {fit,validate,test,predict,prepare,generate} --config configs/….yaml

`fit --print_config=skip_default` shows a configuration; `--model.help NAME`, `--trainer.strategy.compressor.help NAME`
show what a class takes.
"""

import logging
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import callbacks
from lightning_modules import generation
from strategies.compressors import known_compressors


class PareTrainer(Trainer):
    """Lightning's Trainer with Pare's own commands."""

    def prepare(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Tokenise and pack the data into its cache, without training; later starts find it there."""
        started = time.monotonic()
        datamodule.prepare_data()
        datamodule.setup("fit")
        print(f"data ready in {time.monotonic() - started:.2f} s")
        print("\n".join(f"{name}: {value}" for name, value in datamodule.describe().items()))

    def generate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        model_dir: str | None = None,
        prompt: str | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        max_new_tokens: int = 128,
    ) -> None:
        """Stream a continuation of a prompt, or open a prompt loop.

        Args:
            model: Unused; the exported model is loaded.
            datamodule: Unused.
            model_dir: Hugging Face folder or hub name; by default where the config's HFExport wrote.
            prompt: What to continue; none opens the loop.
            temperature: 0 takes the likeliest token; higher is more varied.
            top_p: Sample from the smallest set of tokens with this probability.
            max_new_tokens: Longest continuation, in tokens.
        """
        exports = [str(c.dirpath) for c in self.callbacks if isinstance(c, callbacks.HFExport)]
        folder = model_dir or (exports[0] if exports else None)
        if folder is None:
            raise ValueError("nothing to load: give --model_dir, or a config with an HFExport callback")
        chat = generation.load(folder if model_dir else str(Path(folder).resolve()))
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        if prompt is None:
            generation.repl(*chat, **options)
        else:
            generation.stream(*chat, prompt, **options)


class Parser(LightningArgumentParser):
    """Names the known compressors when one is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See ``ArgumentParser.error``."""
        if "compressor" in message:
            message += "\nKnown compressors: " + ", ".join(c.__name__ for c in known_compressors())
        super().error(message, ex)


class PareCLI(LightningCLI):
    """LightningCLI with two more subcommands; configurations choose every class."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """See ``LightningCLI.subcommands``."""
        own = {"prepare": {"model", "datamodule"}, "generate": {"model", "datamodule"}}
        return {**LightningCLI.subcommands(), **own}


def quiet() -> None:
    """Hide third-party messages that no user can act on."""
    # "Try litlogger" is an advertisement that Lightning has no switch for.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    # torch warns about its own FSDP1 internals, and Lightning uses a name that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends are registered)")
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
