"""Trying schedules out: answers to further facts, by which one of them is chosen."""

from collections.abc import Callable, Sequence
from typing import Any

from common.progress import stage
from lightning_modules.token_pruning.quality.answers import is_right
from lightning_modules.token_pruning.quality.arms import UNPRUNED, of_schedules
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.asking import Answers
from lightning_modules.token_pruning.quality.measure import proportion
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Scorer


def try_out(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Schedule, Scorer]],
    asked: Sequence[Asked],
    answers: Answers,
    bound: Callable[[Schedule, Scorer], float],
) -> list[dict[str, Any]]:
    """Of the unpruned model's right answers, those that stay right under each schedule.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        pairs: Schedules and who scores their stages.
        asked: Facts that nothing was chosen by.
        answers: Asks; an answer that is known is not asked for again.
        bound: FLOP bound of the speed-up.

    Returns:
        A row for each pair, for the record.
    """
    arms = [arm for schedule, scorer in pairs for arm in of_schedules([schedule], [scorer])]
    known = []
    with stage("Trying schedules out", len(asked) * (1 + len(arms)), "answers") as show:
        for number, one in enumerate(asked):
            if is_right(one, answers.of(model, tokenizer, one, UNPRUNED).text):
                known.append([is_right(one, answers.of(model, tokenizer, one, arm).text) for arm in arms])
            show((number + 1) * (1 + len(arms)))
    rows = []
    for number, (arm, (schedule, scorer)) in enumerate(zip(arms, pairs, strict=True)):
        right = sum(each[number] for each in known)
        share, low, high = proportion(right, max(len(known), 1))
        rows.append(
            {
                "scorer": arm.scorer,
                "layers": schedule.layers,
                "keep": schedule.keep,
                "right": right,
                "unpruned": len(known),
                "kept": share,
                "kept_low": low,
                "kept_high": high,
                "bound": bound(schedule, scorer),
            }
        )
    return rows
