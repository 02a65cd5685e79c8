"""What a pruned model promises: the budget asked for, exact reload anywhere, equal portable logits, cheap scores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.experiments.runs import books, fit, say
from bench.tables import figures

RECORDS = "structured.jsonl"
CONFIG = "configs/structured_pruning/prune.yaml"
BUDGETS = (0.1, 0.25, 0.5)
# Sizes that the authors of Llama-3-8B published; enough to count with.
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LARGEST_WEIGHT = 4096 * 14336
# A process that knows nothing of Pare loads the pruned folder and the portable one and compares their logits.
FOREIGN = """
import sys, torch
from transformers import AutoModelForCausalLM

pruned = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
stock = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert not any(name.startswith("lightning") for name in sys.modules)
ids = torch.randint(stock.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    print(float((pruned(ids).logits - stock(ids).logits).abs().max()))
"""


def run(records: Path, folder: Path, model: Path) -> None:
    """Measure and append the figures."""
    common = [*books(), "--data.tokenizer", str(model), "--model.base", str(model), "--model.measure_cost", "true"]
    common += ["--model.cache_dir", str(folder / "cache")]
    runs = {}
    for budget in BUDGETS:
        runs[budget] = _structure(folder, "prune", *common, "--model.budget", str(budget))
        say(f"{budget:.0%}: perplexity {runs[budget]['ppl_after']:.2f}")

    def add(figure: str, what: str, value: float, unit: str, target: str, reached: bool | None, **details: Any) -> None:
        command = f"python -m bench experiment structured_checks --model {model.name}"
        figures.append(
            records,
            figure=f"structure-{figure}",
            what=what,
            value=value,
            unit=unit,
            target=target,
            reached=reached,
            command=command,
            details=details,
        )

    shares = ", ".join(f"{budget:.0%}" for budget in BUDGETS)
    errors = [
        100 * abs(run["budget_obtained"] / run["decoder_parameters_before"] - budget) for budget, run in runs.items()
    ]
    what = f"largest error of the share of decoder parameters removed ({shares})"
    add("budget", what, max(errors), "points", "within 0.5 %", max(errors) <= 0.5, errors=errors)
    reload = max(run["reload_difference"] for run in runs.values())
    add("reload", "logits of the reloaded model against the one saved", reload, "", "bit-identical", reload == 0)
    oracle = max(run["zeroed_and_sliced"] for run in runs.values())
    what = "logits of the sliced model against the dense one with removed parts zeroed"
    add("oracle", what, oracle, "", "≤ 1e-4", oracle <= 1e-4)

    exported = _structure(folder, "export", *common)
    portable, padding = exported["portable_max_difference"], exported["portable_padding_parameters"]
    what = f"logits of the portable export (`{exported['portable_class']}`) against the pruned model"
    add("portable", what, portable, "", "≤ 1e-5", portable <= 1e-5, padding_parameters=padding)
    foreign = _foreign(folder)
    what = "logits in a foreign process, `trust_remote_code` alone, against the portable export"
    add("foreign", what, foreign, "", "≤ 1e-5", foreign <= 1e-5)

    first = runs[BUDGETS[0]]  # later runs find the scores in the cache
    cost = first["score_seconds"] / first["training_pass_seconds"]
    what = "scoring all layers (`GateTaylor`) over one forward and backward pass on the same tokens"
    add("score-cost", what, cost, "×", "≤ 2 ×", cost <= 2, seconds=first["score_seconds"])
    peak = first["peak_memory_bytes"] / 1e6
    add("score-memory", "peak resident memory of the process up to the end of scoring", peak, "MB", "report", None)
    large = _large(folder, common)
    held = (large["weight_bytes_before"] + 2 * LARGEST_WEIGHT) / 1e9
    what = "weights of an 8 B Llama in bfloat16 and one weight's gradient, computed (scoring holds activations besides)"
    add("memory-8b", what, held, "GB", "report", None, parameters=large["parameters_before"])


def _structure(folder: Path, command: str, *arguments: str) -> dict[str, Any]:
    structure: dict[str, Any] = fit(folder / "run", CONFIG, *arguments, command=command).record["structure"]
    return structure


def _foreign(folder: Path) -> float:
    """Largest difference of logits that a process outside of Pare sees."""
    pruned = folder / "run/runs/structured_pruning/pruned"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = subprocess.check_output(
        [sys.executable, "-c", FOREIGN, str(pruned), f"{pruned}-portable"],
        cwd=folder,
        text=True,
        env=environment | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    return float(output.split()[-1])


def _large(folder: Path, common: list[str]) -> dict[str, Any]:
    """Counts of a model of 8 B parameters, from its configuration alone."""
    (folder / "llama-3-8b").mkdir(exist_ok=True)
    (folder / "llama-3-8b/config.json").write_text(json.dumps(LLAMA_3_8B))
    arguments = ["--model.base", str(folder / "llama-3-8b"), "--model.shape", "free", "--model.allocation", "Uniform"]
    arguments += ["--dry_run", "true"]
    return _structure(folder, "prune", *common, *arguments, "--model.dtype", "bfloat16")
