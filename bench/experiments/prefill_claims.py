"""What the original scripts claim to gain on Qwen2-7B, beside the FLOP bound of what they run. Nothing is timed."""

import json
import statistics
from pathlib import Path
from typing import Any

from bench.experiments.runs import json_lines
from bench.tables import figures

RECORDS = "token_pruning.jsonl"
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
SHORT = (1024, 2048, 4096)  # what the claimed means are over
SPEED = {0.9: 1.43, 0.8: 1.96, 0.7: 2.48}  # E-RECAP, one GPU, mean of SHORT
SAVED = {0.9: 12.2, 0.8: 23.8, 0.7: 35.0}  # per cent of FLOPs, E-RECAP


def run(records: Path, folder: Path) -> None:
    """Compute the bounds, and append a figure for each claim."""
    lines = _bounds(folder, (*SHORT, 32768))
    found = {(line["keep"], line["length"]): line["bound"] for line in lines}
    for keep, claimed in SPEED.items():
        bound = statistics.mean(found[keep, length] for length in SHORT)
        _append(records, f"E-RECAP, one GPU, keep {keep}, mean of 1k, 2k and 4k tokens", claimed, bound, "×")
    for keep, claimed in SAVED.items():
        executed = 100 * statistics.mean(1 - 1 / found[keep, length] for length in SHORT)
        _append(records, f"E-RECAP, FLOPs saved, keep {keep}, mean of the same", claimed, executed, "%")
    _append(records, "SDTP, one GPU, keep 0.7, 4k tokens", 2.80, found[0.7, 4096], "×")
    _append(records, "E-RECAP, eight GPUs, keep 0.7, 32k tokens", 39.7, found[0.7, 32768], "×")
    _append(records, "the same, were every token dropped after layer 4 of 28", 39.7, lines[0]["cap"], "×")


def _bounds(folder: Path, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Bounds of the schedule that the scripts run on Qwen2-7B; what they protect never exceeds a stage's budget."""
    model = folder / "qwen2-7b"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(QWEN2_7B))
    arguments = ("--model", str(model), "--tail", "0", "--lengths", *map(str, lengths))
    return list(json_lines("lightning_modules.token_pruning.bound", *arguments, log=folder / "bound.log"))


def _append(records: Path, claim: str, claimed: float, bound: float, unit: str) -> None:
    figures.append(
        records,
        figure=f"claim: {claim}",
        what=f"FLOP bound of {claim} (claimed: {claimed} {unit})",
        value=bound,
        unit=unit,
        target="report",
        reached=None,
        command=COMMAND,
        details={"claim": f"{claim} ({unit})", "model": "Qwen2-7B", "claimed": claimed, "flop_bound": bound},
    )
