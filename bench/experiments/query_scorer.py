"""How much of a prompt a scorer that knows the question must keep, beside pooled `LastWindow` at the same early layer.

The scorer is trained on facts planted in one text and measured on another: planted facts with other values, and natural
questions, of which it has seen none. Beside it stand the head that it starts from, read alone, and itself untrained.
Planted facts come with others of their kind, so that only the question tells which one counts. A run that was stopped
goes on in its `--folder`: saliency where it was, training from its last checkpoint.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.experiments.runs import claim, run_main, say
from bench.tables import figures
from common.files import write_text
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
DISTRACTORS = 2
SCHEDULE = Schedule(layers=[6], keep=0.25)
LEARNED, POOLED = "learned", ("all heads, max", "all heads, mean")  # the two that the target compares


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
        tokenizer, loaded = load_tokenizer(model), load(str(model), dtype="fast")
        documents = [document_text(one, where) for one, where, _ in read_records([text])]
        prompts = {
            "planted": plant(documents, tokenizer, LENGTHS, COUNT, split="test", distractors=DISTRACTORS),
            "natural": find_questions(documents, tokenizer, LENGTHS, COUNT),
        }
        pruner = TokenPruner.load(folder / "runs/query_pruner", loaded)
        found = {kind: measure(loaded, pruner, asked) for kind, asked in prompts.items()}
        write_text(file, json.dumps(found))
    return json.loads(file.read_text())


@torch.no_grad()
def measure(model: Any, pruner: TokenPruner, asked: list[Asked]) -> dict[str, list[float]]:
    """What each prompt needs, after the pruner's first layer, by the trained scorer and by attention there.

    Returns:
        Shares by scorer: the learned one, as it began, the model's head that it began from (where that is one of the
        next layer), and `LastWindow` of the same window and pool over all heads, their largest and their mean.
    """
    parts, layer = anatomy(model), pruner.layers[0]
    network: Any = pruner.network
    untrained = TokenPruner.for_model(model, pruner.layers, network)
    begun = [head for of, head in network.begin or () if of == layer + 1]
    found: dict[str, list[float]] = {}
    for one in asked:
        length = len(one.ids)
        left_out = SCHEDULE.protected(length)
        left_out[max(0, length - network.window) :] = True

        def see(index: int, hidden_BNH: Tensor, rotary: Any, one: Asked = one, left_out: Tensor = left_out) -> None:
            if index != layer + 1:
                return
            paid_AN = tail_attention(parts, index, hidden_BNH, network.window, rotary, None)[0].mean(1)
            scores = {LEARNED: pruner(hidden_BNH, layer)[0], "untrained": untrained(hidden_BNH, layer)[0]}
            scores |= dict(zip(POOLED, (paid_AN.amax(0), paid_AN.mean(0)), strict=True))
            scores |= {"head it began from": paid_AN[begun].amax(0)} if begun else {}
            for name, score_N in scores.items():
                share = share_needed(score_N[None], one.evidence, left_out, network.pool).item()
                found.setdefault(name, []).append(share)

        with watched(model, see), ending_at(model, layer + 1):
            model(input_ids=one.ids[None], use_cache=False)
    return found


def _append(records: Path, model: Path, kind: str, shares: dict[str, list[float]], commit: str | None) -> None:
    """Every scorer's share, and the learned one's over the better `LastWindow`'s, at the median and where 95 % stay."""
    at = {
        "median": {name: statistics.median(values) for name, values in shares.items()},
        "95 %": {name: sorted(values)[int(0.95 * len(values))] for name, values in shares.items()},
    }
    details = {"model": model.name, "prompts": len(shares[LEARNED]), "lengths": LENGTHS, "measured_at": commit, **at}
    for which, needed in at.items():
        pooled = min(needed[name] for name in POOLED)
        figures.append(
            records,
            figure=f"query-need-{kind}-{which.split()[0]}",
            what=f"context that must stay for the whole answer to stay, {kind} questions, {which}, after layer "
            f"{SCHEDULE.layers}: the scorer that knows the question over `LastWindow` of all heads, the same pool",
            value=needed[LEARNED] / max(pooled, 1e-9),
            unit="×",
            target="≤ 0.5",
            reached=needed[LEARNED] <= 0.5 * pooled,
            command=COMMAND,
            details=details,
        )
        for name, share in needed.items():
            figures.append(
                records,
                figure=f"query-share-{kind}-{which.split()[0]}-{name}",
                what=f"context that must stay, {kind} questions, {which}: {name}",
                value=100 * share,
                unit="%",
                target="report",
                reached=None,
                command=COMMAND,
                details=details,
            )
