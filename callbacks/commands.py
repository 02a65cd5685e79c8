"""What Pare's command line does besides fit, validate, test and predict."""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.measurement import computed_in
from callbacks.model_card import HFExport
from callbacks.run_folders import check_apart, check_callbacks, to_continue
from callbacks.run_record import RunRecord
from callbacks.survival import show, survival
from common.records import record
from lightning_modules import generation
from lightning_modules.loading import Dtype, check_vocabulary, is_slow, load, load_tokenizer
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer

Command = Literal[
    "fit", "validate", "test", "predict", "prepare", "prune", "calibrate", "verify", "export", "evaluate", "generate"
]
_LIGHTNINGS_CHOICE = (None, "best", "hpc", "registry")  # of a checkpoint: it looks for it itself
_LIGHTNING = ("fit", "validate", "test", "predict", "prepare", "generate")  # what every module can, or needs no module


class PareTrainer(Trainer):
    """Lightning's Trainer with Pare's own commands."""

    _found: dict[str, Any] | None = None

    def result(self) -> dict[str, Any]:
        """What the command found, in types of JSON: its record, else what it said, else what Lightning measured."""
        written = [c.record for c in self.callbacks if isinstance(c, RunRecord) and c.record is not None]
        metrics = {name: float(value) for name, value in self.callback_metrics.items()}
        found: dict[str, Any] = record.as_json(written[-1] if written else self._found or metrics)
        return found

    def check(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        command: Command = "fit",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what is wrong with a configuration, without running it: classes, values, files, budgets.

        The module refuses what cannot succeed where it has ``check_arguments(command, datamodule)``, as before every
        command, and the data where they have the same.

        Args:
            model: What would run.
            datamodule: Its data.
            command: The command that is to run.
            ckpt_path: As that command takes it.
            weights_only: As that command takes it.

        Raises:
            ValueError: A value, a file or a budget is impossible; the message names it.
        """
        self.check_arguments(command, model, datamodule, ckpt_path)
        self._found = {"command": command}
        print(f"{command}: nothing is wrong with this configuration")

    def check_arguments(
        self,
        command: str,
        model: LightningModule | None,
        datamodule: LightningDataModule | None,
        ckpt_path: str | None = None,
    ) -> str | None:
        """Let data, module, strategy and callbacks refuse what cannot succeed before any text or weight is read.

        Args:
            command: The command that is to run.
            model: Refuses where it has ``check_arguments(command, datamodule)``.
            datamodule: The same.
            ckpt_path: As that command takes it.

        Returns:
            The checkpoint to take, see ``to_continue``.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: The module does not know the command, or a part refuses.
        """
        if command not in _LIGHTNING and not hasattr(model, command):
            raise ValueError(f"model: {type(model).__name__} has nothing to {command}")
        ckpt_path = to_continue(ckpt_path, self.callbacks)
        if ckpt_path not in _LIGHTNINGS_CHOICE and "://" not in str(ckpt_path) and not Path(str(ckpt_path)).exists():
            raise FileNotFoundError(f"ckpt_path: there is no checkpoint {ckpt_path}")
        check_ranks: Any = getattr(self.strategy, "check_ranks", None)
        if check_ranks is not None:
            check_ranks(self.num_nodes * self.num_devices)
        for part in (datamodule, model):
            refuse: Any = getattr(part, "check_arguments", None)
            if refuse is not None:
                refuse(command, datamodule)
        check_callbacks(self.callbacks, command, model, datamodule)
        check_apart(self, command, model)
        if is_slow(computed_in(self.precision)):
            rank_zero_info(
                f"trainer.precision {self.precision}: this processor has no instructions for it and may take tens of "
                "times as long as in float32 (--trainer.precision 32-true)"
            )
        return ckpt_path

    def prepare(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Tokenise and pack the data into its cache, without training; later starts find it there."""
        started = time.monotonic()
        datamodule.prepare_data()
        datamodule.setup("fit")
        self._found = datamodule.describe()
        print(f"data ready in {time.monotonic() - started:.2f} s")
        print("\n".join(f"{name}: {value}" for name, value in self._found.items()))

    def prune(self, model: LightningModule, datamodule: LightningDataModule, dry_run: bool = False) -> None:
        """Prune the model once, in this process, and save it where its configuration says.

        Args:
            model: A module that can prune: it has ``prune(datamodule, device, dry_run)``.
            datamodule: Calibration and evaluation text.
            dry_run: Only say what would be removed; no weights are touched or written.
        """
        self._once("prune", model, datamodule, dry_run=dry_run)

    def calibrate(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Measure a model on the user's text, and write the settings that suit it where its configuration says.

        Args:
            model: A module that can calibrate: it has ``calibrate(datamodule, device)``.
            datamodule: The text.
        """
        self._once("calibrate", model, datamodule)

    def verify(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Prove on real text that the saved result computes what it claims to.

        Args:
            model: A module that can verify: it has ``verify(datamodule, device)``.
            datamodule: Text to compare on.
        """
        self._once("verify", model, datamodule)

    def export(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Write the result in a form that loads without Pare.

        Args:
            model: A module that can export: it has ``export(datamodule, device)``.
            datamodule: Text that the exported model is checked on.
        """
        self._once("export", model, datamodule)

    def evaluate(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Ask models tasks, in this process.

        Args:
            model: A module that can evaluate: it has ``evaluate(device)``.
            datamodule: Unused; tasks bring their own text.
        """
        evaluate: Any = model.evaluate
        self._record(model, datamodule, evaluate(self.strategy.root_device))

    def _once(self, command: str, model: LightningModule, datamodule: LightningDataModule, **options: Any) -> None:
        """Run a module's method of this name on prepared data; what it returns are fields of the run record."""
        method: Any = getattr(model, command)
        datamodule.prepare_data()
        datamodule.setup("fit")
        self._record(model, datamodule, method(datamodule, self.strategy.root_device, **options))

    def _record(self, model: LightningModule, datamodule: LightningDataModule | None, fields: Any) -> None:
        self._found = fields
        for callback in self.callbacks:
            if fields and isinstance(callback, RunRecord):
                callback.write(self, model, datamodule, fields)

    def generate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        model_dir: str | None = None,
        prompt: str | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        max_new_tokens: int = 128,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        chat: bool = False,
        dtype: Dtype = "float32",
        attention: str | None = None,
        scorer: Scorer | None = None,
        schedule: Schedule | None = None,
        pruner: str | None = None,
        show_survival: bool = False,
    ) -> None:
        """Stream a continuation of a prompt, or open a prompt loop; with a scorer the prompt is pruned.

        What the model's own generation configuration says of sampling and lengths does not count.

        Args:
            model: Says by default what to load: its ``output``, or its ``base`` where it calibrates.
            datamodule: Its ``tokenizer`` is taken where the model's folder has none.
            model_dir: Hugging Face folder, GGUF file or hub name; by default where the config's HFExport wrote, else
                the result of its `prune`, else the model of its `calibrate`.
            prompt: What to continue; none opens the loop.
            temperature: 0 takes the likeliest token; higher is more varied.
            top_p: Sample from the smallest set of tokens with this probability.
            max_new_tokens: Longest continuation, in tokens.
            top_k: Sample from this many likeliest tokens; 0 from all.
            repetition_penalty: Scores of tokens that are there already are divided by this; 1 is none.
            chat: The prompt is a message to a chat model: the tokenizer's chat template renders it.
            dtype: What weights are loaded as; "auto" is what they are on disk, "fast" the same but
                float32 on processors without instructions for 16 bits.
            attention: Attention kernel, as transformers names it; None takes transformers' choice.
            scorer: Prune the prompt: which tokens to keep.
            schedule: After which layers and how many; by default 70 % each at 4/28, 7/28, … of the model's depth.
            pruner: Prune the prompt as `calibrate` found, in place of scorer and schedule: its folder.
            show_survival: After the continuation, show which prompt token was dropped where, and record it.

        Raises:
            FileNotFoundError: No such pruner.
            ValueError: No ``model_dir``, and a config that writes no model; survival without pruning, or without a
                prompt; a pruner beside a scorer or schedule.
        """
        model_dir = model_dir or _written(self.callbacks, model)
        if model_dir is None:
            raise ValueError("nothing to load: give --model_dir, or a config that writes a model")
        if pruner is not None and (scorer or schedule):
            raise ValueError("pruner has its own scorer and schedule: leave these out")
        if show_survival and ((scorer or pruner) is None or prompt is None):
            raise ValueError("show_survival needs a pruner, or a scorer, and a prompt")
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        options |= {"top_k": top_k, "repetition_penalty": repetition_penalty}
        generation.sampling(temperature, top_p, top_k)  # refuses what is out of range before anything is loaded
        tokenizer = load_tokenizer(model_dir, datamodule)
        pruning = PromptPruner(scorer, schedule) if scorer is not None else None
        pruning = PromptPruner.from_file(pruner) if pruner is not None else pruning
        loaded: Any = load(model_dir, dtype, attention, supported=pruning.check if pruning is not None else None)
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        check_vocabulary(loaded, tokenizer)
        if tokenizer.chat_template is not None and not chat:
            print("the tokenizer has a chat template: --chat true asks the model in its own form", file=sys.stderr)
        with nullcontext() if pruning is None else pruning.prefill(loaded) as run:
            if prompt is None:
                generation.repl(loaded, tokenizer, chat, **options)
            else:
                asked = [{"role": "user", "content": prompt}] if chat else prompt
                self._found = {"prompt": prompt, "text": generation.stream(loaded, tokenizer, asked, **options)}
        if show_survival and run is not None:
            fields = survival(run, tokenizer)
            self._record(model, datamodule, {"survival": fields})
            show(fields)


def _written(callbacks: Sequence[Any], model: LightningModule) -> str | None:
    """The model that a configuration leaves: what was trained, pruned, or calibrated for."""
    exported = [str(c.dirpath.resolve()) for c in callbacks if isinstance(c, HFExport)]
    if exported:
        return exported[0]
    left: Any = getattr(model, "base" if hasattr(model, "calibrate") else "output", None)
    return None if left is None else str(left)
