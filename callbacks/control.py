"""The control of a recovery: the dense model tuned alike.

A pruned model that is tuned on some text gets better at that text, and so would the dense model. What pruning costs is
the ratio of the two after the same tuning.
"""

import copy
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from callbacks.parser import explained
from callbacks.time_to_quality import TimeToQuality
from common.files import check_output, inputs_of, write_text
from common.tables import Table
from lightning_modules.loading import load_config

FILE = "control.json"
_BEGUN = "alike.json"  # how the dense model is being tuned: says what its checkpoints are of until ``FILE`` is there
_CHECKPOINTS = "checkpoints"
_KEPT = ("OtherText", "Throughput", "GradientGuard", "RunRecord", "ModelCheckpoint", "HFExport")
# what a run does not depend on, or what is the pruned model's alone
_OTHER: dict[str, tuple[str, ...]] = {
    "trainer": (
        "callbacks",
        "logger",
        "default_root_dir",
        "log_every_n_steps",
        "profiler",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
    ),
    "data": ("cache_dir", "num_workers", "num_proc"),
    "model": ("base", "overwrite", "merged", "adapter"),
}
_TEACHING = ("teacher", "distill_weight", "temperature", "hidden_weight")


class ControlCurve(TimeToQuality):
    """In the control's own run: writes its curve, and how it was tuned, when training is done.

    Args:
        path: File to write.
        alike: What a run that is compared with it must have in common.
    """

    def __init__(self, path: str, alike: dict[str, Any]) -> None:
        super().__init__(from_start=True)
        self.path, self.alike = Path(path), alike

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, on rank 0."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_text(self.path, json.dumps({"alike": self.alike, "curve": self.curve}, indent=1) + "\n")


class Control(TimeToQuality):
    """Puts beside every perplexity that of the dense model tuned alike: same data, steps, adapters, rate and seed.

    ``main.py fit`` tunes the dense model first, unless the folder holds it already; when it is killed, the same command
    goes on. The dense model learns from the text alone: a teacher that is itself would only hold it back. Perplexities
    of ``OtherText`` are compared too. The record has the curve over training time, validation excluded, and the first
    point is before any step: what was pruned, beside the dense model as it was.

    Args:
        folder: Where the tuned dense model is kept: its curve (control.json), ``checkpoints`` and ``model``.
        dense: Hugging Face folder or hub name of the dense model; by default the module's ``teacher``.
    """

    def __init__(self, folder: str, dense: str | None = None) -> None:
        super().__init__(from_start=True)
        self.dense = dense or ""
        self.folder = Path(folder).expanduser()
        self._control: dict[int, dict[str, float]] = {}

    # ---- before training ------------------------------------------------------------------------------------------

    def check_arguments(self, command: str, model: Any, data: Any) -> None:
        """Refuse what cannot be compared.

        Raises:
            FileNotFoundError: The dense model is not there.
            ValueError: It has another vocabulary than the pruned one, or none is given; the run goes on from an
                adapter; or the folder is or holds an input.
        """
        if command != "fit":
            return
        if not hasattr(model, "base"):
            raise ValueError(f"Control: {type(model).__name__} has no base that was pruned from a dense model")
        if getattr(model, "adapter", None) is not None:
            raise ValueError(
                "model.adapter: a run that goes on from an adapter has no like in a dense model tuned from the start; "
                "leave out the adapter, or Control"
            )
        self.dense = self.dense or getattr(model, "teacher_path", None) or ""
        if not self.dense:
            raise ValueError("Control.dense: give the dense model, which the base was pruned from, or a teacher")
        dense, pruned = load_config(self.dense), load_config(model.base)
        if dense.vocab_size != pruned.vocab_size:
            raise ValueError(
                f"Control.dense: its vocabulary has {dense.vocab_size} tokens, the base's has {pruned.vocab_size}; "
                "give the model that the base was pruned from"
            )
        check_output(self.folder, "Control.folder", [self.dense, *inputs_of(model, data)], overwrite=True)

    def run_first(self, config: Mapping[str, Any], trainer: Trainer, data: Any) -> dict[str, Any] | None:
        """The configuration of ``fit`` that tunes the dense model; None where that is done, and in a trial run.

        Args:
            config: Configuration of the run that is to be compared with it.
            trainer: Of that run.
            data: The same.

        Raises:
            ValueError: The folder holds a model that was, or is being, tuned otherwise; the message says what differs.
        """
        if trainer.fast_dev_run:
            return None
        run = self._alone(config)
        callbacks = run["trainer"]["callbacks"]
        others = [one["init_args"] for one in callbacks if _name(one) == "OtherText"]
        alike: dict[str, Any] = {part: _without(run[part], *names) for part, names in _OTHER.items()}
        alike["model"] = _without(alike["model"], *_TEACHING)
        alike |= {
            "seed": config.get("seed_everything"),
            "texts": others,
            "text files": [[_identity(Path(file)) for file in one.get("texts", {}).values()] for one in others],
            "ranks": trainer.num_nodes * trainer.num_devices,
            "text": getattr(data, "source_key", lambda: None)(),
            "dense": self.dense,
            "weights": _identity(Path(self.dense)),
        }
        alike = json.loads(json.dumps(alike, default=str))
        path, begun = self.folder / FILE, self.folder / _BEGUN
        said = next((file for file in (path, begun) if file.is_file()), None)
        if said is not None:
            done = json.loads(said.read_text(encoding="utf-8"))["alike"]
            if (difference := _difference(done, alike)) is not None:
                raise ValueError(
                    f"Control.folder: the dense model in {self.folder} was tuned otherwise ({difference}); give "
                    "another folder, or delete it, and the dense model is tuned again"
                )
        elif any((self.folder / _CHECKPOINTS).glob("*")):
            raise ValueError(
                f"Control.folder: nothing says how the dense model of the checkpoints in {self.folder} is tuned; give "
                "another folder, or delete it, and the dense model is tuned again"
            )
        if path.is_file():
            return None
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(begun, json.dumps({"alike": alike}, indent=1) + "\n")
        init_args = {"path": str(path), "alike": alike}
        callbacks.append({"class_path": "callbacks.control.ControlCurve", "init_args": init_args})
        rank_zero_info(f"control: tuning the dense model {self.dense} alike first; it is kept in {self.folder}")
        return run

    def _alone(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The same run of the dense model, with what it writes within the folder."""
        run = copy.deepcopy(dict(config))
        model = run["model"]["init_args"]
        model["base"] = self.dense
        model.update({name: None for name in ("teacher", "adapter", "merged") if name in model})
        trainer = run["trainer"]
        trainer["logger"] = False
        trainer["callbacks"] = [one for one in trainer["callbacks"] if _name(one) in _KEPT]
        places = {"ModelCheckpoint": self.folder / _CHECKPOINTS, "HFExport": self.folder / "model"}
        for one in trainer["callbacks"]:
            if (name := _name(one)) in places:
                one["init_args"]["dirpath"] = str(places[name])
            elif name == "RunRecord":
                one["init_args"]["run_name"] = f"{one['init_args'].get('run_name') or 'run'}_control"
        run["ckpt_path"] = "auto"
        run.pop("push", None)
        return run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the control's curve, then see ``TimeToQuality``.

        Raises:
            FileNotFoundError: The dense model has not been tuned.
        """
        path = self.folder / FILE
        if trainer.fast_dev_run:
            return
        if not path.is_file():
            raise FileNotFoundError(
                f"Control.folder: no {FILE} in {self.folder}: the dense model is not tuned yet; `main.py fit` does it"
            )
        curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
        self._control = {point["step"]: point for point in curve}
        super().on_train_start(trainer, pl_module)

    # ---- results --------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the control's perplexities beside the new point."""
        before = self.curve
        super().on_validation_end(trainer, pl_module)
        if self.curve is before:
            return
        point = self.curve[-1]
        found = beside(point, self._control.get(int(point["step"]), {}))
        point |= found
        ratios = {name.removeprefix("ratio"): ratio for name, ratio in found.items() if name.startswith("ratio")}
        said = ", ".join(f"{text.removeprefix('_') or 'validation'} {ratio:.3f} ×" for text, ratio in ratios.items())
        rank_zero_info(f"step {point['step']}: perplexity over that of the dense model tuned alike: {said or 'none'}")

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        if not self.curve or not self._control:
            return super().summary()
        first, last = self.curve[0], self.curve[-1]
        untouched = self._control.get(0, {})
        texts = {}
        for text in _texts(last):
            texts[text.removeprefix("_") or "validation"] = {
                "ppl_dense": untouched.get(f"val_ppl{text}"),
                "ppl_control": last.get(f"control_ppl{text}"),
                "ppl_before": first[f"val_ppl{text}"] if first["step"] == 0 else None,
                "ppl": last[f"val_ppl{text}"],
                "ratio_before": first.get(f"ratio{text}") if first["step"] == 0 else None,
                "ratio": last.get(f"ratio{text}"),
            }
        recovery = {"dense": self.dense, "train_s": last["train_s"], "steps": last["step"], "texts": texts}
        return super().summary() | {"recovery": recovery}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result."""
        fields = self.summary().get("recovery")
        if fields and trainer.is_global_zero:
            Console().print(_table(fields))


class TunesControls(LightningCLI):
    """A command line whose ``fit`` tunes the dense model first where a ``Control`` wants to compare with it."""

    def before_fit(self) -> None:
        """Check the arguments, then run the controls that are not there yet, each as a ``fit`` of its own.

        It runs in this process, and in the ranks that the first ``fit`` launches, which go the same way as rank 0.
        """
        self.check_arguments()
        self._dump_config()
        for control in (callback for callback in self.trainer.callbacks if isinstance(callback, Control)):
            with explained(self.parser):
                run = control.run_first(self.config_dump, self.trainer, self.datamodule)
            if run is None:
                continue
            try:
                self._again(run)
            except SystemExit:
                print("the dense model is not tuned yet: the same command goes on with it", file=sys.stderr)
                raise
            self._set_seed()  # as if there had been no other run: adapters begin with the same values

    def _again(self, run: dict[str, Any]) -> None:
        """Another ``fit`` by this command line."""
        type(self)(
            args={"subcommand": "fit", "fit": run},
            trainer_class=self.trainer_class,
            parser_class=self.parser_class,
            save_config_callback=self.save_config_callback,
            save_config_kwargs=self.save_config_kwargs,
            trainer_defaults={"callbacks": [type(callback)() for callback in self.trainer_defaults["callbacks"]]},
            auto_configure_optimizers=self.auto_configure_optimizers,
            seed_everything_default=self.seed_everything_default,
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """See ``LightningCLI.parse_arguments``, which warns of arguments beside those of the command line."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def check_arguments(self) -> None:
        """Refuse what cannot succeed, before any text or weight is read."""


def beside(point: Mapping[str, float], control: Mapping[str, float]) -> dict[str, float]:
    """The control's perplexities at the same step, and the ratios; without those that it has not."""
    found: dict[str, float] = {}
    for text in _texts(point):
        if (ppl := control.get(f"val_ppl{text}")) is not None:
            found |= {f"control_ppl{text}": ppl, f"ratio{text}": point[f"val_ppl{text}"] / ppl}
    return found


def _texts(point: Mapping[str, float]) -> list[str]:
    """What follows ``val_ppl`` in the names of a point: "" for the validation text, "_NAME" for others."""
    return [name.removeprefix("val_ppl") for name in point if name.startswith("val_ppl")]


def _table(fields: Mapping[str, Any]) -> Table:
    title = f"perplexity after {fields['steps']} steps, {fields['train_s']:.0f} s of training"
    names = ("ppl_dense", "ppl_control", "ppl_before", "ppl", "ratio_before", "ratio")
    rows = [[text, *(row[name] for name in names)] for text, row in fields["texts"].items()]
    headers = ["text", "dense", "dense tuned alike", "pruned", "recovered", "pruned / dense", "recovered / tuned alike"]
    return Table(headers, rows, title)


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["class_path"]).rpartition(".")[2]


def _without(part: Any, *names: str) -> dict[str, Any]:
    """A part of a configuration without some arguments, also where it is a class and its arguments."""
    arguments = part.get("init_args", part) if part else {}
    kept = {name: value for name, value in arguments.items() if name not in names}
    return kept | ({"class_path": part["class_path"]} if part and "class_path" in part else {})


def _identity(path: Path) -> list[Any]:
    """Size and time of change of a file, or of a folder's weights; nothing for a hub name."""
    path = path.expanduser()
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _difference(done: Any, now: Any, at: str = "") -> str | None:
    """Where two configurations differ first, in words; None where they do not."""
    if isinstance(done, dict) and isinstance(now, dict):
        for name in sorted({*done, *now}):
            found = _difference(done.get(name), now.get(name), f"{at}.{name}" if at else name)
            if found is not None:
                return found
        return None
    return None if done == now else f"{at} {done!r:.80}, now {now!r:.80}"
