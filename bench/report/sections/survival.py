"""Which tokens of a prompt survive pruning, as readable text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bench.report import drawing
from bench.report.content import Block, Markings, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import Record
from common.tables import Table

_LEAD = (
    "The prompt as the model read it. Tokens with a coloured ground were dropped, the number says at which stage; the "
    "others reached the last layer. A dropped token still shaped the tokens that had already looked at it."
)
_MAX_SHADES = 8
_MAX_TOKENS = 6000


@dataclass(frozen=True)
class Survival:
    """Tokens of one prompt.

    Attributes:
        tokens: Their text.
        dropped_at: Stage (from 0) after which each was dropped; None for those that survived.
        layers: Layer of each stage.
    """

    tokens: list[str]
    dropped_at: list[int | None]
    layers: list[int]


def parse(block: Any) -> Survival:
    """The record's block `survival`.

    Raises:
        ValueError: Lists of different lengths, or a stage that is not there.
    """
    found = Survival(
        [str(token) for token in block["tokens"]],
        [None if stage is None else int(stage) for stage in block["dropped_at"]],
        [int(layer) for layer in block["layers"]],
    )
    if len(found.tokens) != len(found.dropped_at):
        raise ValueError(f"{len(found.tokens)} tokens, but {len(found.dropped_at)} in dropped_at")
    if any(stage is not None and not 0 <= stage < len(found.layers) for stage in found.dropped_at):
        raise ValueError(f"dropped_at names a stage outside 0 … {len(found.layers) - 1}")
    return found


def section(evidence: Evidence) -> Section | None:
    """The prompts; None when no run recorded one."""
    found = evidence.blocks("survival", parse)
    if not found:
        return None
    blocks: list[Block] = []
    for index, (name, survival) in enumerate(found[-drawing.MAX_RUNS :]):
        runs = evidence.having("survival")
        blocks += [Markings(_text(name, survival)), _counts(f"survival-{index}", name, survival, runs)]
    return Section("survival", "Which tokens survive", f"{_LEAD} {drawing.last_runs(len(found))}".strip(), blocks)


def _shade(stage: int, stages: int) -> int:
    """Class 1 … 8: the earlier a token goes, the stronger its ground."""
    return _MAX_SHADES - stage * (_MAX_SHADES - 1) // max(stages - 1, 1)


def _text(name: str, survival: Survival) -> Markup:
    stages = len(survival.layers)
    legend = Markup(" ").join(
        Markup('<span class="tok t{}">stage {}: layer {}</span>').format(_shade(stage, stages), stage + 1, layer)
        for stage, layer in enumerate(survival.layers)
    )
    parts, previous = [], None
    for token, stage in zip(survival.tokens[:_MAX_TOKENS], survival.dropped_at, strict=False):
        if stage is None:
            parts.append(Markup("{}").format(token))
        else:
            # The number stands at the start of each stretch: once a token would make the text unreadable.
            mark = Markup("<sub>{}</sub>").format(stage + 1) if stage != previous else ""
            template = Markup('<span class="tok t{}" title="dropped at stage {}">{}{}</span>')
            parts.append(template.format(_shade(stage, stages), stage + 1, mark, token))
        previous = stage
    cut = len(survival.tokens) - _MAX_TOKENS
    rest = Markup("<p>{} further tokens are not shown.</p>").format(f"{cut:,}") if cut > 0 else ""
    template = Markup(
        '<h4>{}</h4><p class="legend"><span class="tok">kept</span> {}</p>'
        '<div class="tokens" role="region" tabindex="0" aria-label="Prompt of {} with dropped tokens marked">{}</div>{}'
    )
    return template.format(name, legend, name, Markup("").join(parts), rest)


def _counts(anchor: str, name: str, survival: Survival, records: Sequence[Record]) -> Sheet:
    dropped = Counter(survival.dropped_at)
    left, rows = len(survival.tokens), []
    for stage, layer in enumerate(survival.layers):
        left -= dropped[stage]
        rows.append([stage + 1, layer, dropped[stage], left, 100 * left / max(len(survival.tokens), 1)])
    headers = ["stage", "layer", "dropped", "left", "left of all (%)"]
    said = f"{left:,} of {len(survival.tokens):,} tokens reach the last layer."
    return Sheet(anchor, f"Tokens left after each stage: {name}", Table(headers, rows), verdict=said, records=records)
