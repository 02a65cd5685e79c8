"""What the original scripts claim to gain, beside the FLOP bound of what they run, and the same schedule measured.

Claimed is what SDTP's and E-RECAP's authors report for Qwen2-7B. Measured is a model with that depth, head width and
proportions at a quarter of the width, random weights, on this machine.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import figures
from bench.experiments.prefill_speed import measure
from bench.experiments.runs import ROOT, say

COMMAND = "python -m bench experiment prefill_claims"
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QUARTER = {
    "hidden_size": 896,
    "intermediate_size": 4736,
    "num_hidden_layers": 28,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
}
SHORT = (1024, 2048, 4096)  # what the claimed means are over
LENGTH, REPEATS = 1024, 3
SPEED = {0.9: 1.43, 0.8: 1.96, 0.7: 2.48}  # E-RECAP, one GPU, mean of SHORT
SAVED = {0.9: 12.2, 0.8: 23.8, 0.7: 35.0}  # per cent of FLOPs, E-RECAP
COLUMNS = ("claimed", "FLOP bound, Qwen2-7B", "measured, quarter width", "its FLOP bound")


def run(records: Path, folder: Path) -> None:
    """Compute the bounds, measure the three schedules, and append a figure for each entry of the table."""
    lines = _bounds(folder, (*SHORT, 32768))
    found = {(line["keep"], line["length"]): line["bound"] for line in lines}
    cap, stages = lines[0]["cap"], lines[0]["stages"]
    for keep, claimed in SPEED.items():
        block = measure(folder, [LENGTH], REPEATS, stages, keep, **QUARTER)
        arm = next(arm for arm in block["arms"] if arm["arm"] == "pruned")
        bound = statistics.mean(found[keep, length] for length in SHORT)
        say(f"keep {keep}: {arm['speedup']:.2f}×, bound {arm['bound']:.2f}×")
        what = f"E-RECAP, one GPU, keep {keep}, mean of 1k, 2k and 4k tokens (×)"
        _append(records, what, [claimed, bound, arm["speedup"], arm["bound"]], {"arm": arm})
    for keep, claimed in SAVED.items():
        executed = 100 * statistics.mean(1 - 1 / found[keep, length] for length in SHORT)
        _append(records, f"E-RECAP, FLOPs saved, keep {keep} (%)", [claimed, executed, None, None], {})
    _append(records, "SDTP, one GPU, keep 0.7, 4k tokens (×)", [2.80, found[0.7, 4096], None, None], {})
    what = "E-RECAP, eight GPUs, keep 0.7, 32k tokens (×)"
    _append(records, what, [39.7, found[0.7, 32768], None, None], {})
    what = "the same; bound of any pruning after layer 4 of 28, all tokens dropped there (×)"
    _append(records, what, [39.7, cap, None, None], {})


def _bounds(folder: Path, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Bounds of the published schedule on Qwen2-7B."""
    model = folder / "qwen2-7b"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(QWEN2_7B))
    command = [sys.executable, "-m", "lightning_modules.token_pruning.bound", "--model", str(model), "--lengths"]
    done = subprocess.run([*command, *map(str, lengths)], cwd=ROOT, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _append(records: Path, claim: str, values: list[float | None], details: dict[str, Any]) -> None:
    for column, value in zip(COLUMNS, values, strict=True):
        if value is not None:
            figures.append(
                records,
                figure=f"claim: {claim}: {column}",
                what=f"{claim}: {column}",
                value=value,
                unit="",
                target="report",
                reached=None,
                command=COMMAND,
                details={"claim": claim, "column": column, **details},
            )
