"""Block sparsity: share of the weights that are zero against perplexity, and the speed of packed weights."""

import re
from collections import defaultdict

from bench.report.evidence import Evidence
from bench.report.features.base import OVER_DENSE, Axis, Case, Feature, Point, Speed, of_figure, setting
from bench.report.values import Record, number, text

_ZEROS = re.compile(r"([\d.]+) % zeros")
_DENSE = re.compile(r"product-int8-\d+")  # of weights of which none is left out
_PERPLEXITIES = ("block_peers", "block_tuning", "block_million")
_CONTROL = "magnitude"


def _cases(evidence: Evidence) -> list[Case]:
    """Figures alone: a run with tiers does not say which other run was trained alike and left dense."""
    found: dict[str, list[Point]] = defaultdict(list)
    for one in (one for name in _PERPLEXITIES for one in evidence.figures_of(name)):
        zeros, arm = number(one, "details.tiers.sparsity"), text(one["details"].get("arm"))
        if zeros:
            tokens = number(one, "details.tuned_tokens")
            trained = f"fine-tuned alike on {tokens:,.0f} tokens" if tokens else "nothing trained"
            name = arm.partition("-")[2] if tokens else arm
            found[_title(one, trained)] += of_figure(name, 100 * zeros, number(one, "value"), one, _CONTROL)
    for one in evidence.figures_of("real_model"):
        zeros = number(one, "details.zeros")
        if zeros:
            arm = text(one["details"].get("arm"))
            found[_title(one, "nothing trained")] += of_figure(arm, zeros, number(one, "value"), one, _CONTROL)
    for one in evidence.figures_of("block_quality"):
        ratio, shares = number(one, "details.over_dense"), _ZEROS.findall(one["what"])
        name = one["figure"].removeprefix("block-ppl-")
        if ratio is not None and shares and name != "dense":
            found["Llama of 8 M parameters, fine-tuned alike"] += of_figure(
                name, float(shares[-1]), ratio, one, _CONTROL
            )
    return [Case(title, points) for title, points in found.items()]


def _title(one: Record, trained: str) -> str:
    return f"{text(one['details'].get('model'))}, {text(one['details'].get('text'))}, {trained} ({setting(one)})"


def _speeds(evidence: Evidence) -> list[Speed]:
    found = []
    for one in evidence.figures_of("block_speed"):
        value, dense = number(one, "value"), _DENSE.fullmatch(one["figure"])
        if one["figure"].startswith("product-") and not dense and value is not None:
            what = one["what"].partition(" over ")[0].rstrip(",")
            key = one["figure"].removeprefix("product-").rpartition("-")[0]
            found.append(Speed(what, key, value, number(one, "details.bound"), (one,)))
    return found


def _said(point: Point) -> str:
    return f"With {point.saving:.0f} % zeros perplexity is {point.quality:.2f} × the dense model's"


FEATURE = Feature(
    "block_sparsity",
    "Block sparsity",
    "Weights go in 16×16 blocks: dense, two of four, or the largest few.",
    Axis("weights that are zero (%)", "zeros (%)", 0.0),
    *OVER_DENSE,
    _cases,
    _speeds,
    _said,
)
