"""What pruned prefill costs and gains on a CPU, beside the FLOP bound: a Qwen2-shaped model with random weights.

Weights and scorers are untrained: how fast a prompt is read does not depend on which tokens are kept.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Qwen2Config

from bench.experiments.runs import run_main, say
from bench.tables import figures
from common.records import record

RECORDS = "token_pruning.jsonl"
REPEATS = {2048: 21, 4096: 7, 8192: 7}  # of each length: where a pass is short, the machine's noise is a larger part
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4864,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
STAGES, KEEP = [1, 3, 5], 0.7
COMMAND = "python -m bench experiment prefill_speed"


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    for length, repeats in REPEATS.items():
        block = measure(folder, length, repeats)
        arms = {arm["arm"]: arm for arm in block["arms"]}
        if arms:
            _append(records, length, arms, block["kernels"])
        else:
            say(f"{length} tokens: {block['skipped'][str(length)]}")


def measure(folder: Path, length: int, repeats: int) -> dict[str, Any]:
    """Run `validate` on a model of `SHAPE`; the block `prefill` of its record."""
    base = folder / "model"
    if not base.exists():
        AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)).save_pretrained(base)
    timing = {"class_path": "PrefillTiming", "init_args": {"lengths": [length], "repeats": repeats, "warmup": 1}}
    schedule = {
        "class_path": "lightning_modules.token_pruning.schedule.Schedule",
        "init_args": {"layers": STAGES, "keep": KEEP},
    }
    arguments = ["--trainer.callbacks", str([timing, "RunRecord"]), "--trainer.logger", "false"]
    arguments += ["--model.base", str(base), "--model.pruner", "null", "--model.schedule", str(schedule)]
    arguments += ["--model.mse_weight", "0", "--model.ranking_weight", "0"]
    arguments += ["--data.tokenizer", "null", "--data.vocab_size", "4096"]
    run_main(folder, "validate", "configs/token_pruning/prefill.yaml", *arguments)
    say((folder / "output.log").read_text())
    found, _ = record.read(folder / "runs/results.jsonl")
    return found[-1]["prefill"]


def _append(records: Path, length: int, arms: dict[str, dict[str, Any]], kernels: list[str]) -> None:
    pruned, whole = arms["pruned"], arms["keep-1.0"]
    shown = {"arms": arms, "kernels": kernels, "shape": SHAPE, "stages": STAGES, "keep": KEEP}
    floor, overhead = 0.9 * pruned["bound"], 100 * (1 / whole["speedup"] - 1)
    figures.append(
        records,
        figure=f"prefill-speedup-{length}",
        what=f"prefill of {length:,} tokens, pruned over unpruned, keep {KEEP} (bound {pruned['bound']:.2f}×)",
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
