"""A planner that reads its whole, growing context again for every plan (E-RECAP): latency of each plan, and the plans.

A courier walks from place to place and is told what lies where. After every observation the planner is asked where the
next thing on the list is. Nothing of the last reading is reused, because what matters changes with the question.
"""

import random
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.experiments.runs import claim, say
from bench.tables import figures
from callbacks.survival import survival
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from lightning_modules.generation import own_config
from lightning_modules.loading import load
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.scorers.random import Random

RECORDS = "planner.jsonl"
COMMAND = "python -m bench experiment planner --model FOLDER --pruner FOLDER"
STEPS, REPEATS, PLAN_TOKENS = 24, 3, 16
SHOWN = 6  # reports of the prompt whose tokens are shown
THINGS = (
    "lantern",
    "violin",
    "teapot",
    "umbrella",
    "compass",
    "basket",
    "mirror",
    "saddle",
    "kettle",
    "blanket",
    "hammer",
    "globe",
)
PLACES = (
    "harbour office",
    "bakery",
    "chapel",
    "library",
    "boat house",
    "museum",
    "market hall",
    "post office",
    "mill",
    "theatre",
)
PASSING = (
    "The street was wet, and a cart with barrels stood across it; the courier had to wait until it was moved.",
    "Two boys ran past with a dog, and an old man on a bench asked what time it was.",
    "A window was open on the first floor, and somebody was practising the same four notes again and again.",
    "There was a smell of tar and rope, and gulls were quarrelling over something on the roof.",
    "A notice about the spring fair hung on the door, half torn off by the wind.",
    "The clerk at the counter was counting coins and did not look up for a long time.",
)


def observations(steps: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """What the courier reports, one observation a step, and after each what is asked and where it is.

    Returns:
        Observation, thing that is asked for, place where it was seen last.
    """
    draw = random.Random(seed)
    seen: dict[str, str] = {}
    found = []
    for step in range(steps):
        thing, place = draw.choice(THINGS), draw.choice(PLACES)
        seen[thing] = place
        passing = " ".join(draw.sample(PASSING, 3))
        text = f"Report {step + 1}. {passing} In the {place} the courier saw the {thing}. {draw.choice(PASSING)}"
        asked = draw.choice(sorted(seen))
        found.append((text, asked, seen[asked]))
    return found


def prompt(tokenizer: Any, reports: list[str], asked: str) -> torch.Tensor:
    """The planner's whole context, int64 `[1, N]`."""
    question = f"Where should the courier go to fetch the {asked}? Answer with the place of the latest report about it."
    content = "\n".join(["Reports of a courier:", *reports, "", question])
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: torch.Tensor = tokenizer(content, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def run(records: Path, folder: Path, model: Path, pruner: Path) -> None:
    """Plan step by step and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a chat model.
        pruner: What `calibrate` found for it.
    """
    claim(folder, model, pruner)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    loaded = load(model, "fast")
    calibrated = PromptPruner.from_file(pruner)
    pruners = {"pruned": calibrated, "random": PromptPruner(Random(), calibrated.schedule)}
    rows = plan(loaded, tokenizer, pruners, observations(STEPS))
    for arm in pruners:
        _append(records, model, arm, [row for row in rows if row["arm"] == arm], calibrated)
    seen = look(loaded, tokenizer, calibrated, observations(SHOWN))
    figures.append(
        records,
        figure="planner-survival",
        what=f"tokens of the planner's prompt after {SHOWN} reports that stay to the last layer",
        value=100 * seen["survival"]["dropped_at"].count(None) / len(seen["survival"]["tokens"]),
        unit="%",
        target="report",
        reached=None,
        command=COMMAND,
        details={"model": model.name, "schedule": calibrated.schedule.arguments(), **seen},
    )


def plan(
    model: Any, tokenizer: Any, pruners: dict[str, PromptPruner], world: list[tuple[str, str, str]]
) -> list[dict[str, Any]]:
    """Ask for a plan after every observation, unpruned and pruned, all arms in turns.

    Equal numbers of new tokens in all arms: a plan that stops early is not faster.

    Returns:
        A row for each step and pruner: `tokens`, `bound`, `speedup` and its spread, milliseconds, `same` (the plan is
        the unpruned model's, word by word), and whether each names the right place.
    """
    cost, rows, reports = Cost.of(model), [], []
    for text, asked, place in world:
        reports.append(text)
        ids = prompt(tokenizer, reports, asked)
        said: dict[str, str] = {}

        def arm(name: str, ids: torch.Tensor = ids, said: dict[str, str] = said) -> None:
            options = {"max_new_tokens": PLAN_TOKENS, "min_new_tokens": PLAN_TOKENS, "do_sample": False}
            with own_config(model, tokenizer), torch.inference_mode():
                if name == "unpruned":
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
                else:
                    with pruners[name].prefill(model):
                        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            said[name] = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

        arms = {name: lambda name=name: arm(name) for name in ("unpruned", *pruners)}
        times = interleaved(arms, REPEATS, warmup=1)
        for name, pruner in pruners.items():
            faster = ratio_with_spread(times["unpruned"], times[name])
            rows.append(
                {
                    "arm": name,
                    "tokens": ids.shape[1],
                    "bound": cost.bound(ids.shape[1], pruner.schedule, pruner.scorer),
                    "ms_unpruned": percentiles(times["unpruned"])["p50"],
                    "ms": percentiles(times[name])["p50"],
                    "speedup": faster["ratio"],
                    "speedup_spread": faster["spread"],
                    "same": said[name] == said["unpruned"],
                    "right": place in said[name],
                    "whole_right": place in said["unpruned"],
                }
            )
        last = rows[-len(pruners)]
        took = f"{last['ms_unpruned']:.0f} ms, {last['arm']} {last['ms']:.0f} ms a plan"
        say(f"{len(reports)} reports, {ids.shape[1]} tokens: {took}")
    return rows


@torch.inference_mode()
def look(model: Any, tokenizer: Any, pruner: PromptPruner, world: list[tuple[str, str, str]]) -> dict[str, Any]:
    """One plan, and what became of every token of its prompt.

    Returns:
        `asked`, `right` (the place), `said`, and `survival`, see `callbacks.survival`.
    """
    reports, asked, place = [text for text, _, _ in world], *world[-1][1:]
    ids = prompt(tokenizer, reports, asked)
    with own_config(model, tokenizer), pruner.prefill(model) as seen:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=PLAN_TOKENS, do_sample=False)
    said = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return {"asked": asked, "right": place, "said": said, "survival": survival(seen, tokenizer)}


def _append(records: Path, model: Path, arm: str, rows: list[dict[str, Any]], pruner: PromptPruner) -> None:
    long = [row for row in rows if row["tokens"] >= rows[-1]["tokens"] / 2]
    details = {"model": model.name, "schedule": pruner.schedule.arguments(), "steps": rows}
    common: dict[str, Any] = {"target": "report", "reached": None, "command": COMMAND, "details": details}
    figures.append(
        records,
        figure=f"planner-latency-{arm}",
        what=f"a plan of {PLAN_TOKENS} tokens, contexts of {long[0]['tokens']:,} to {long[-1]['tokens']:,} tokens read "
        f"anew, {arm}: speed-up of the whole plan (median over steps)",
        value=median(row["speedup"] for row in long),
        spread=median(row["speedup_spread"] for row in long),
        unit="×",
        **common,
    )
    right = [row["right"] for row in rows if row["whole_right"]]
    figures.append(
        records,
        figure=f"planner-plans-{arm}",
        what=f"right places in plans, of the {len(right)} of {len(rows)} that the unpruned model gets right, {arm}",
        value=100 * sum(right) / len(right) if right else None,
        unit="%",
        **common,
    )
    figures.append(
        records,
        figure=f"planner-same-{arm}",
        what=f"plans that equal the unpruned model's word by word, {arm}",
        value=100 * sum(row["same"] for row in rows) / len(rows),
        unit="%",
        **common,
    )
