"""All together on a real model: what heads, channels, blocks, bits and prompt tokens give one after another.

A chat model loses a share of its decoder and is recovered, then blocks of its weights go to 2:4, then it is stored in
int8, then its prompts are pruned. Each text is cut in two: the first halves are calibrated and recovered on, the second
half of the first text is measured on. Finished runs of a `--folder` are not repeated.
"""

import importlib.util
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.experiments.runs import claim, halves, once
from bench.tables import figures
from common.records import record
from lightning_modules.loading import load_config
from lightning_modules.token_pruning.schedule import Schedule

RECORDS = "together.jsonl"
COMMAND = "python -m bench experiment together --model FOLDER --texts NAME=FILE"
BLOCK, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 32, 32
BUDGET, STEPS = 0.1, 60
SHARES = {"iterations": 1, "dense": 0.6, "mid_2_4": 0.4, "topk": 0.0}
KEEP = 0.25  # of the tokens, after half of the layers
TIMED = {"windows": 32, "suffix": 64, "facts": 30, "lengths": [600, 1200], "prompt_tokens": 1024, "repeats": 7}
ADDED = {
    "structure": f"{BUDGET:.0%} of the decoder's parameters removed, recovered in {STEPS} steps",
    "tiers": f"{SHARES['mid_2_4']:.0%} of the blocks at 2:4, nothing trained",
    "int8 files": "values in int8 in the packed file",
    "int8": "weights held in int8",
    "tokens": f"prompts cut to {KEEP:.0%} of their tokens after half of the layers (`LastWindow`)",
}


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path]) -> None:
    """Make the models, measure, and append the figures and the record they are of.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a chat model.
        texts: Texts by name.

    Raises:
        ValueError: A text too short to be cut in two, or a folder that ``claim`` refuses.
    """
    # torchao is asked for and left out where it is missing: the ladder then has a rung less
    bits = importlib.util.find_spec("torchao") is not None
    order = [(name, str(path)) for name, path in texts.items()]  # the first is measured on
    commit = claim(folder, model, *texts.values(), model=model.name, texts=order, bits=bits)
    data = _data(folder, model, next(iter(halves(folder, texts).values())))
    found = _measured(folder, model, data, _made(folder, model, data), bits)
    known = record.read(records)[0] if records.exists() else []
    if found["run_name"] not in {one.get("run_name") for one in known if one.get("date") == found["date"]}:
        record.append(records, found)
    rungs = found["ladder"]["rungs"]
    for before, rung in itertools.pairwise(rungs):
        _figures(records, model, rungs[0], before, rung, commit)


def _data(folder: Path, model: Path, evaluated: Path) -> tuple[str, ...]:
    files = ("--data", "TextCorpus", "--data.train", str(folder / "calibration.json"), "--data.val", str(evaluated))
    shape = ("--data.block_size", str(BLOCK), "--data.batch_size", "2", "--data.max_val_blocks", str(EVALUATION_BLOCKS))
    return (*files, "--data.tokenizer", str(model), *shape)


def _made(folder: Path, model: Path, data: tuple[str, ...]) -> dict[str, str]:
    """The models, each from the one before."""
    blocks = ("--model.calibration_blocks", str(CALIBRATION_BLOCKS))
    pruned, recovered, tiers = (folder / name / "model" for name in ("structure", "recovered", "tiers"))
    structured = ("--model.base", str(model), "--model.output", str(pruned), "--model.budget", str(BUDGET), *blocks)
    once(folder / "structure", "prune", "configs/structured_pruning/prune.yaml", *data, *structured)
    recovery = ["--model.base", str(pruned), "--model.teacher", str(model), "--trainer.max_steps", str(STEPS)]
    recovery += ["--trainer.val_check_interval", str(STEPS), "--trainer.accumulate_grad_batches", "2"]
    recovery += ["--trainer.callbacks.dirpath", str(recovered), "--ckpt_path", "auto"]  # the last is HFExport
    once(folder / "recovered", "fit", "configs/structured_pruning/recover.yaml", *data, *recovery)
    schedule = ("--model.schedule", json.dumps({"class_path": "LinearSchedule", "init_args": SHARES}))
    block = ("--model.pretrained", str(recovered), "--model.output", str(tiers), *blocks)
    once(folder / "tiers", "prune", "configs/block_sparsity/oneshot.yaml", *data, *block, *schedule)
    packed: dict[str, str] = {"structure": str(recovered)}
    for name, given in (("tiers", []), ("int8 files", ["--model.export_dtype", "int8"])):
        place = folder / f"packed-{name.replace(' ', '-')}"
        output = ("--model.pretrained", str(tiers), "--model.output", str(place / "model"))
        once(place, "export", "configs/block_sparsity/export.yaml", *data, *output, *given)
        packed[name] = str(place / "model")
    return packed


def _measured(
    folder: Path, model: Path, data: tuple[str, ...], models: Mapping[str, str], bits: bool
) -> dict[str, Any]:
    """The record of the ladder, made unless it was."""
    schedule = Schedule(layers=[load_config(model).num_hidden_layers // 2], keep=KEEP)
    named = f"{Schedule.__module__}.{Schedule.__name__}"
    given: dict[str, Any] = {"models": models, **TIMED}
    given["schedule"] = {"class_path": named, "init_args": {"layers": schedule.layers, "keep": schedule.keep}}
    given |= {"weights": "int8"} if bits else {}
    arguments = [part for name, value in given.items() for part in (f"--trainer.callbacks.{name}", json.dumps(value))]
    config, pretrained = "configs/evaluation/together.yaml", ("--model.pretrained", str(model))
    return once(folder / "together", "validate", config, *pretrained, *data, *arguments)


def _figures(records: Path, model: Path, dense: Any, before: Any, rung: Any, commit: str | None) -> None:
    """What one step costs and gains, over the dense model and over the step before."""
    name, details = rung["rung"], {"model": model.name, "measured_at": commit, "before": before["rung"], **rung}
    values: dict[str, tuple[str, float, float | None, str]] = {
        "loss": (
            f"rise of the loss over dense ({dense['nll']:.3f}); the step itself {rung['nll'] - before['nll']:+.3f}",
            rung["nll_rise"],
            (rung["nll_rise_high"] - rung["nll_rise_low"]) / 2,
            "nats/token",
        )
    }
    if "right" in rung:
        facts = f"of {rung['asked']} planted facts answered right (dense {dense['right']:.0%}, before the step"
        half = 50 * (rung["right_high"] - rung["right_low"])
        values["facts"] = (f"{facts} {before['right']:.0%})", 100 * rung["right"], half, "%")
    for phase in ("prefill", "decode"):
        bound = f"bound {rung[f'{phase}_bound']:.2f} ×; the step itself {rung[f'{phase}_gain']:.2f} ×"
        speed, spread = rung[f"{phase}_speedup"], rung[f"{phase}_speedup_spread"]
        values[phase] = (f"speed of {phase} over dense ({bound})", speed, spread, "×")
    for what, field in (("files", "file_bytes"), ("memory", "weight_bytes"), ("cache", "kv_bytes")):
        step = before[field] / rung[field]
        words = f"bytes of {what}, dense over this; the step itself {step:.2f} ×"
        values[what] = (words, dense[field] / rung[field], None, "×")
    for what, (words, value, spread, unit) in values.items():
        figures.append(
            records,
            figure=f"together-{name.replace(' ', '-')}-{what}",
            what=f"+ {name} ({ADDED[name]}): {words}",
            value=value,
            spread=spread,
            unit=unit,
            target="report",
            reached=None,
            command=COMMAND,
            details=details,
        )
