"""Speed of a structurally pruned model beside the dense one and the FLOP bound: prefill and decode, three batch sizes.

A Llama-shaped model with random weights, wide enough that matrix products are what takes time; how fast it is does not
depend on what it has learnt. Only the tokenizer is the given model's.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bench.experiments.runs import fit, say
from bench.tables import figures

RECORDS = "structured.jsonl"
PRUNE, VALIDATE = (f"configs/structured_pruning/{name}.yaml" for name in ("prune", "validate"))
COMMAND = "python -m bench experiment structured_speed --model FOLDER"
BUDGETS, PROMPT, REPEATS = (0.25, 0.5), 256, 5
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure and append the figures."""
    for budget in BUDGETS:
        for row in measure(folder, model, budget, PROMPT, [1, 8, 64], REPEATS)["rows"]:
            _append(records, budget, row)


def measure(
    folder: Path, model: Path, budget: float, prompt: int, batches: list[int], repeats: int, **shape: int
) -> dict[str, Any]:
    """Prune a model of this shape and time it; the block `inference` of the record of `validate`."""
    base = folder / "model"
    if not base.exists():
        tokenizer = AutoTokenizer.from_pretrained(model)
        settings: dict[str, Any] = {**SHAPE, "vocab_size": len(tokenizer), **shape}
        AutoModelForCausalLM.from_config(LlamaConfig(**settings)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    pruned = str(folder / f"pruned-{budget}")
    common = ["--model.base", str(base), "--model.output", pruned, "--data.max_val_blocks", "8"]
    common += ["--data.tokenizer", str(base)]
    by_size = ["--model.budget", str(budget), "--model.importance", "Magnitude"]
    by_size += ["--model.shape", "free", "--model.allocation", "Uniform"]
    fit(folder, PRUNE, *common, *by_size, command="prune")
    say(f"{budget:.0%} removed; timing")
    timing = {"dense": str(base), "pruned": pruned, "prompt_tokens": prompt, "batch_sizes": batches, "repeats": repeats}
    callbacks = [{"class_path": "InferenceTiming", "init_args": timing}, "RunRecord"]
    found = fit(folder, VALIDATE, *common, "--trainer.callbacks", str(callbacks), command="validate").record
    block: dict[str, Any] = found["inference"]
    return block


def _append(records: Path, budget: float, row: dict[str, Any]) -> None:
    prefill = row["phase"] == "prefill"
    floor = 0.85 * row["flop_bound"]
    figures.append(
        records,
        figure=f"structured-{row['phase']}-{budget}-{row['batch']}",
        what=f"{row['phase']}, batch {row['batch']}, {budget:.0%} of the decoder removed, over the dense model "
        f"(bounds: FLOPs {row['flop_bound']:.2f}×, bytes {row['byte_bound']:.2f}×)"
        + ("; beyond its bound, so suspicious" if row["suspicious"] else ""),
        value=row["speedup"],
        spread=row["speedup_spread"],
        unit="×",
        target=f"≥ 0.85 × the FLOP bound = {floor:.2f}×" if prefill else "report",
        reached=row["speedup"] >= floor if prefill else None,
        command=COMMAND,
        details={**row, "shape": SHAPE, "prompt_tokens": PROMPT},
    )
