"""What a calibrated pruner's prefill costs and gains on a pretrained model, beside the FLOP bound."""

from pathlib import Path
from typing import Any

from bench.experiments.runs import claim, run_main, say
from bench.tables import figures
from common.records import record
from lightning_modules.token_pruning.prefill import PromptPruner

RECORDS = "token_pruning.jsonl"
REPEATS = {1024: 31, 2048: 21, 4096: 11, 8192: 5}  # where a pass is short, the machine's noise is a larger part
COMMAND = "python -m bench experiment prefill_speed --model FOLDER --pruner FOLDER"


def run(records: Path, folder: Path, model: Path, pruner: Path) -> None:
    """Measure and append the figures; a length that was measured in this folder is not measured again.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of the model.
        pruner: What `calibrate` found for it.
    """
    claim(folder, model, pruner)
    for length, repeats in REPEATS.items():
        block = measure(folder / str(length), model, pruner, length, repeats)
        arms = {arm["arm"]: arm for arm in block["arms"]}
        if arms:
            _append(records, model, pruner, length, arms, block["kernels"])
        else:
            say(f"{length} tokens: {block['skipped'][str(length)]}")


def measure(folder: Path, model: Path, pruner: Path, length: int, repeats: int) -> dict[str, Any]:
    """Run `validate`, unless that was done; the block `prefill` of its record."""
    left = folder / "runs/results.jsonl"
    if not left.is_file():
        timing = {"pruner": str(pruner), "lengths": [length], "repeats": repeats, "warmup": 1}
        callbacks = [{"class_path": "PrefillTiming", "init_args": timing}, "RunRecord"]
        arguments = ["--trainer.callbacks", str(callbacks), "--model.pretrained", str(model)]
        arguments += ["--data.tokenizer", str(model)]
        run_main(folder, "validate", "configs/token_pruning/calibrated.yaml", *arguments)
        say((folder / "output.log").read_text())
    return record.read(left)[0][-1]["prefill"]


def _append(
    records: Path, model: Path, pruner: Path, length: int, arms: dict[str, dict[str, Any]], kernels: list[str]
) -> None:
    pruned, whole = arms["pruned"], arms["keep-1.0"]
    schedule = PromptPruner.from_file(pruner).schedule
    shown = {"model": model.name, "arms": arms, "kernels": kernels, "schedule": schedule.arguments()}
    floor, overhead = 0.9 * pruned["bound"], 100 * (1 / whole["speedup"] - 1)
    figures.append(
        records,
        figure=f"prefill-speedup-{length}",
        what=f"prefill of {length:,} tokens, pruned over unpruned (bound {pruned['bound']:.2f}×)",
        value=pruned["speedup"],
        spread=pruned["speedup_spread"],
        unit="×",
        target=f"≥ 0.9 × the FLOP bound = {floor:.2f}×",
        reached=pruned["speedup"] >= floor,
        command=COMMAND,
        details=shown,
    )
    figures.append(
        records,
        figure=f"prefill-overhead-{length}",
        what=f"hooks, scorers and selection at {length:,} tokens when everything is kept",
        value=overhead,
        spread=100 * whole["speedup_spread"] / whole["speedup"] ** 2,
        unit="%",
        target="≤ 3 %",
        reached=overhead <= 3,
        command=COMMAND,
        details=shown,
    )
