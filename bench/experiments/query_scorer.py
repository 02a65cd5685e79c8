"""How much of a prompt a scorer that knows the question must keep, beside pooled `LastWindow` at the same early layer.

The scorer is trained on facts planted in one text and measured on another: planted facts with other values, and natural
questions, of which it has seen none. A run that was stopped goes on in its `--folder`: saliency where it was, training
from its last checkpoint.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.experiments.runs import claim, run_main, say
from bench.tables import figures
from lightning_modules.data.readers import document_text, read_records
from lightning_modules.loading import load, load_tokenizer
from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.calibration.retrieval import share_needed
from lightning_modules.token_pruning.passes import ending_at, watched
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.planted import plant
from lightning_modules.token_pruning.quality.questions import find_questions
from lightning_modules.token_pruning.schedule import Schedule

RECORDS = "query_scorer.jsonl"
COMMAND = "python -m bench experiment query_scorer --model FOLDER --texts train=FILE,test=FILE"
CONFIGS = "configs/token_pruning"
LENGTHS = [512, 1024, 2048]
COUNT = 102  # prompts of each kind
SCHEDULE = Schedule(layers=[6], keep=0.25)


def run(records: Path, folder: Path, model: Path, texts: dict[str, Path]) -> None:
    """Train, measure and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of SmolLM2-135M-Instruct: the configurations name its heads.
        texts: "train" and "test", of other documents.

    Raises:
        ValueError: Other texts, a text too short, or a folder that ``claim`` refuses.
    """
    if set(texts) != {"train", "test"}:
        raise ValueError(f"texts: give train=FILE,test=FILE; got {', '.join(texts)}")
    commit = claim(folder, model, *texts.values(), model=model.name, texts={n: str(p) for n, p in texts.items()})
    given = ["--model.base", str(model), "--data.tokenizer", str(model), "--data.train", str(texts["train"].resolve())]
    if not (folder / "runs/query_pruner").exists():
        say(f"saliency: {run_main(folder, 'predict', f'{CONFIGS}/query_saliency.yaml', *given):.0f} s")
        last = folder / "runs/query_pruning/checkpoints/last.ckpt"
        resumed = ["--ckpt_path", str(last.resolve())] if last.exists() else []
        say(f"training: {run_main(folder, 'fit', f'{CONFIGS}/query_train.yaml', *given, *resumed):.0f} s")
    for kind, shares in _needs(folder, model, texts["test"]).items():
        _append(records, model, kind, shares, commit)


def _needs(folder: Path, model: Path, text: Path) -> dict[str, dict[str, list[float]]]:
    """Share of each prompt that must stay, by kind of question and scorer; measured once."""
    file = folder / "needs.json"
    if not file.exists():
        tokenizer, loaded = load_tokenizer(model), load(str(model), dtype="bfloat16")
        documents = [document_text(one, where) for one, where, _ in read_records([text])]
        prompts = {
            "planted": plant(documents, tokenizer, LENGTHS, COUNT, split="test"),
            "natural": find_questions(documents, tokenizer, LENGTHS, COUNT),
        }
        pruner = TokenPruner.load(folder / "runs/query_pruner", loaded)
        found = {kind: measure(loaded, pruner, asked) for kind, asked in prompts.items()}
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


@torch.no_grad()
def measure(model: Any, pruner: TokenPruner, asked: list[Asked]) -> dict[str, list[float]]:
    """What each prompt needs by the trained scorer and by `LastWindow`, after the pruner's first layer."""
    parts, layer = anatomy(model), pruner.layers[0]
    network: Any = pruner.network
    found: dict[str, list[float]] = {"learned": [], "last_window": []}
    for one in asked:
        length = len(one.ids)
        left_out = SCHEDULE.protected(length)
        left_out[max(0, length - network.window) :] = True

        def see(index: int, hidden_BNH: Tensor, rotary: Any, one: Asked = one, left_out: Tensor = left_out) -> None:
            if index == layer + 1:
                paid_AWN = tail_attention(parts, index, hidden_BNH, network.window, rotary, None)[0]
                scores = {"learned": pruner(hidden_BNH, layer)[0], "last_window": paid_AWN.mean(1).amax(0)}
                for name, score_N in scores.items():
                    found[name].append(share_needed(score_N[None], one.evidence, left_out, network.pool).item())

        with watched(model, see), ending_at(model, layer + 1):
            model(input_ids=one.ids[None], use_cache=False)
    return found


def _append(records: Path, model: Path, kind: str, shares: dict[str, list[float]], commit: str | None) -> None:
    medians = {name: statistics.median(values) for name, values in shares.items()}
    figures.append(
        records,
        figure=f"query-need-{kind}",
        what=f"context that must stay for the whole answer to stay, {kind} questions, after layer {SCHEDULE.layers}: "
        "the scorer that knows the question over `LastWindow` (max over heads, the same pool), medians",
        value=medians["learned"] / max(medians["last_window"], 1e-9),
        unit="×",
        target="≤ 0.5",
        reached=medians["learned"] <= 0.5 * medians["last_window"],
        command=COMMAND,
        details={
            "model": model.name,
            "prompts": len(shares["learned"]),
            "lengths": LENGTHS,
            "median": medians,
            "90 %": {name: sorted(values)[int(0.9 * len(values))] for name, values in shares.items()},
            "measured_at": commit,
        },
    )
