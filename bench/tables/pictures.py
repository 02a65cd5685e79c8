"""Pictures of the documents, drawn from records into docs/pictures.

A picture carries a digest of the numbers it was drawn from, so that it is known to be old when the records have others.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench.report.drawing import STYLE, plain_numbers
from bench.report.palette import GREY, hue
from bench.tables import figures
from bench.tables.compare import lookup
from common.records import record

FOLDER, _DPI = "docs/pictures", 120
Numbers = dict[str, Any]  # what is drawn, as JSON
_RATES = ("50mbit", "100mbit", "250mbit", "500mbit", "1gbit", "10gbit")
_TEXTS = {"wikitext2": "WikiText-2", "novel": "a novel"}
_ARMS = {"structured-25": "a quarter removed\n(structured)", "two-four": "2:4 everywhere\n(50 % zeros)"}
_ARMS |= {"three-tiers": "three tiers\n(41.7 % zeros)", "mix": "best mix in\nas many bytes"}
_SCORERS = {"mlp": "learned", "hidden_norm": "length of hidden state", "last_window": "attention of the last tokens"}
_SCORERS |= {"random": "random", "recency": "the end of the prompt"}
_KEPT = {  # by the scorer's name in the records; others by that name
    "calibrated": "calibrated",
    "random": "random, same schedule",
    "last_window": "all heads, 16 last tokens, same schedule",
    "snap_kv": "SnapKV (a smaller cache only)",
    "expected_attention": "ExpectedAttention (cache only)",
    "random_cache": "random cache (cache only)",
    "fast_kv": "FastKV",
    "gem_filter": "GemFilter",
    "llm_lingua": "LLMLingua",
}
_PATTERNS = {
    "dense": "dense",
    "wanda": "unstructured, 41.8 %",
    "half": "2:4, 50 %",
    "oneshot": "three tiers, 41.7 %, one cut",
    "progressive": "three tiers, 41.7 %, five steps",
}
_LEVELS = {
    "flat_none": "one group: fp32",
    "flat_int8": "int8 gradients",
    "flat_two_hops": "int8 gradients in two hops",
    "flat_within": "int8, backward gathers inside hosts",
    "flat_int8_both": "int8 gradients and parameters",
    "flat_differences": "two hops, int4 parameter differences",
    "hsdp_none": "sharded inside hosts: fp32 between",
    "hsdp_int8": "int8 between",
    "hsdp_int4": "int4 between",
    "ddp_none": "whole on each rank: fp32",
    "ddp_int8": "int8, one group",
    "ddp_two_int8": "int8 between, reduced inside first",
}


class Picture(NamedTuple):
    """What is to be seen, what to take from the records, how to draw it, the page it belongs to, its size in inches."""

    shows: str
    take: Callable[[Path], Numbers]
    draw: Callable[[Figure, Numbers], None]
    page: str
    size: tuple[float, float] = (6.4, 3.0)


# ---- numbers -------------------------------------------------------------------------------------------------------


def _figures(folder: Path, file: str) -> dict[str, Mapping[str, Any]]:
    return {one["figure"]: one for one in figures.latest(record.read(folder / file)[0])}


def _links(folder: Path) -> Numbers:
    """Speed-up of a step over no compression by link rate."""
    found = _figures(folder, "links.jsonl")
    methods = ("none_a2a", "bf16_both", "int8_gradients", "int8_both")
    return {name: [found[f"speedup-{name}-{rate}"]["value"] for rate in _RATES] for name in methods}


def _prefill(folder: Path) -> Numbers:
    """Speed-up of a pretrained model's calibrated prefill, and its bound, by prompt length."""
    found = _figures(folder, "token_pruning.jsonl")
    lengths = (1024, 2048, 4096)
    arms = {length: found[f"prefill-speedup-{length}"]["details"]["arms"]["pruned"] for length in lengths}
    return {str(length): {"measured": arm["speedup"], "bound": arm["bound"]} for length, arm in arms.items()}


def _real(folder: Path) -> Numbers:
    """Perplexity over the dense model's, by way of pruning and text."""
    found = _figures(folder, "real_model.jsonl")
    return {arm: {text: found[f"{arm}-{text}"]["value"] for text in _TEXTS} for arm in _ARMS}


def _kept(folder: Path) -> Numbers:
    """By who chooses: bounds of the speed of prefill, shares of the right answers kept in %, and their intervals."""
    points: dict[str, dict[float, list[float]]] = {}
    found = _figures(folder, "token_answers.jsonl")
    for figure, one in sorted(found.items(), key=lambda item: str(item[1]["date"])):  # of one bound the newest
        row = one["details"]
        if figure.startswith(("needles-more-", "needles-calibrated-")) and "-unseen-" not in figure:
            name = "calibrated" if row["scorer"].startswith("calibrated-") else row["scorer"].partition("(")[0]
            points.setdefault(name, {})[round(row["bound"], 2)] = [row["bound"], one["value"], row["low"], row["high"]]
    return {name: [mine[bound] for bound in sorted(mine)] for name, mine in points.items()}


def _needed(folder: Path) -> Numbers:
    """Share of the context that a planted answer needs, in %, by layer: with its best heads, and with all."""
    rows = _figures(folder, "real_model.jsonl")["needed"]["details"]["needed"]
    return {"layers": [row["layer"] for row in rows]} | {
        field: [100 * row[field] for row in rows] for field in ("share", "all_heads")
    }


def _overview(folder: Path) -> Numbers:
    return {"links": _links(folder), "prefill": _prefill(folder), "real": _real(folder)}


def _recall(folder: Path) -> Numbers:
    """Answers right by scorer and share kept."""
    found = _figures(folder, "token_quality.jsonl")
    keep = (0.7, 0.5, 0.3)
    return {scorer: [found[f"recall-recall-{scorer}-{share}"]["value"] for share in keep] for scorer in _SCORERS}


def _importances(folder: Path) -> Numbers:
    """Perplexity by importance and allocation, a quarter removed, before recovery; and the dense model's."""
    cells = [one for one in _figures(folder, "ablation.jsonl").values() if lookup(one, "details.when") == "before"]
    quarter = [one for one in cells if one["details"]["budget"] == "25%"]
    rows: Numbers = {"dense": quarter[0]["details"]["dense_ppl"], "cells": {}}
    for one in quarter:
        name, allocation = (one["details"][field].strip("`") for field in ("importance", "allocation"))
        rows["cells"].setdefault(name, {})[allocation] = one["value"]
    return rows


def _patterns(folder: Path) -> Numbers:
    found = _figures(folder, "block_sparsity.jsonl")
    return {arm: [found[f"block-ppl-{arm}"][field] for field in ("value", "spread")] for arm in _PATTERNS}


def _two_levels(folder: Path) -> Numbers:
    """Bytes between two hosts and time of a step, by method."""
    found = _figures(folder, "two_levels.jsonl")
    rows = {method: found[f"between-hosts-{method}"] for method in _LEVELS}
    return {method: {"MB": row["value"], "s": row["details"]["step_ms"] / 1e3} for method, row in rows.items()}


def _profile(folder: Path) -> Numbers:
    """Seconds of a step in computing and in each collective, by run."""
    steps = {}
    for run in record.read(folder / "profile.jsonl")[0]:
        wire = {name: ms / run["steps_measured"] / 1e3 for name, ms in run["comm_time_ms_by_op"].items()}
        steps[run["run_name"]] = {"compute": run["step_time_ms_mean"] / 1e3 - sum(wire.values()), **wire}
    return steps


# ---- drawing -------------------------------------------------------------------------------------------------------


def _draw_links(axes: Axes, numbers: Numbers) -> None:
    names = {
        "none_a2a": "fp32, half of gloo's bytes",
        "int8_gradients": "int8 gradients",
        "bf16_both": "bf16 gradients and parameters",
        "int8_both": "int8 gradients and parameters",
    }
    for index, (name, label) in enumerate(names.items()):
        colour = GREY if name == "none_a2a" else hue(index - 1)
        axes.plot(range(len(_RATES)), numbers[name], marker="o", color=colour, label=label)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(
        range(len(_RATES)), [rate.replace("bit", "").replace("m", " M").replace("g", " G") for rate in _RATES]
    )
    axes.set_xlabel("link between two hosts, bit/s")
    axes.set_title("training step, times faster")
    axes.legend(loc="upper right", fontsize=7)


def _draw_prefill(axes: Axes, numbers: Numbers) -> None:
    for index, (name, label) in enumerate({"bound": "bound by FLOPs", "measured": "measured"}.items()):
        places = [place + 0.38 * index - 0.19 for place in range(len(numbers))]
        heights = [one[name] for one in numbers.values()]
        axes.bar(places, heights, 0.36, color=GREY if name == "bound" else hue(0), label=label)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(numbers)), [f"{int(length):,}" for length in numbers])
    axes.set_xlabel("tokens in the prompt")
    axes.set_title("reading a prompt, times faster")
    axes.set_ylim(0, 1.3 * max(one["bound"] for one in numbers.values()))  # room for the legend
    axes.legend(loc="upper left", fontsize=7)


def _draw_real(axes: Axes, numbers: Numbers) -> None:
    for index, (text, label) in enumerate(_TEXTS.items()):
        places = [place + 0.38 * index - 0.19 for place in range(len(numbers))]
        bars = axes.bar(places, [one[text] for one in numbers.values()], 0.36, color=hue(index), label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(numbers)), [_ARMS[arm] for arm in numbers], fontsize=6.5)
    axes.set_title("perplexity, times the dense model's")
    axes.legend(loc="upper left", fontsize=7)


def _draw_kept(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    axes.plot(1, 100, marker="*", markersize=10, linestyle="", color=GREY, label="unpruned")
    for index, (name, points) in enumerate(numbers.items()):
        bound, value, low, high = ([point[field] for point in points] for field in range(4))
        error = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        colour = GREY if "random" in name else hue(index)
        axes.errorbar(bound, value, yerr=error, marker="os^DvPX"[index % 7], color=colour, label=_KEPT.get(name, name))
    axes.set_ylim(0, 104)
    axes.set_xlabel("prefill, times faster: bound by FLOPs")
    axes.set_title("right answers that stay right, %")
    figure.legend(loc="outside right center")


def _draw_needed(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    for field, label, colour in (("all_heads", "all heads", GREY), ("share", "its best heads", hue(0))):
        axes.plot(numbers["layers"], numbers[field], marker="o", markersize=4, color=colour, label=label)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_xlabel("layer whose attention chooses")
    axes.set_title("% of the prompt that must stay for the answer to stay")
    axes.legend()


def _draw_overview(figure: Figure, numbers: Numbers) -> None:
    links, prefill, real = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.2))
    _draw_links(links, numbers["links"])
    _draw_prefill(prefill, numbers["prefill"])
    _draw_real(real, numbers["real"])


def _draw_recall(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    for index, (scorer, label) in enumerate(_SCORERS.items()):
        colour = GREY if scorer in ("random", "recency") else hue(index)
        style = ":" if scorer == "recency" else "-"
        axes.plot(range(3), numbers[scorer], marker="o", color=colour, linestyle=style, label=label)
    axes.set_xticks(range(3), ["70 %", "50 %", "30 %"])
    axes.set_xlabel("of the prompt's tokens kept")
    axes.set_title("facts of the prompt answered right, %")
    figure.legend(loc="outside right center")


def _draw_importances(figure: Figure, numbers: Numbers) -> None:
    axes, cells = figure.subplots(), numbers["cells"]
    for index, allocation in enumerate(("Uniform", "Inverse", "Global")):
        values = [one[allocation] for one in cells.values()]
        axes.plot(values, range(len(cells)), "osD"[index], color=hue(index), label=allocation)
    axes.axvline(numbers["dense"], color=GREY, linestyle="--", label="dense")
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_title("perplexity, a quarter of the decoder removed")
    figure.legend(loc="outside right center", title="budget divided")


def _draw_patterns(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    values, spreads = zip(*numbers.values(), strict=True)
    for place, (arm, value, spread) in enumerate(zip(numbers, values, spreads, strict=True)):
        axes.errorbar(value, place, xerr=spread, fmt="o", color=GREY if arm == "dense" else hue(0), markersize=8)
    axes.set_yticks(range(len(numbers)), [_PATTERNS[arm] for arm in numbers])
    axes.invert_yaxis()
    axes.set_title("perplexity after equal fine-tuning, 8 M parameters")


def _draw_two_levels(figure: Figure, numbers: Numbers) -> None:
    titles = {"MB": "MB from host to host in a step", "s": "seconds of a step"}
    colours = {"flat": GREY, "hsdp": hue(0), "ddp": hue(1)}
    for axes, (field, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        colour = [colours[method.partition("_")[0]] for method in numbers]
        bars = axes.barh(
            [_LEVELS[method] for method in numbers], [one[field] for one in numbers.values()], color=colour
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.margins(x=0.12)
        axes.set_title(title)
        axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()


def _draw_profile(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    labels = {"profile_1_rank": "one rank", "profile_2_ranks": "two ranks, one machine"}
    labels |= {"profile_2_hosts_1gbit": "two hosts, 1 Gbit/s"}
    left = [0.0] * len(numbers)
    for index, part in enumerate(("compute", "all_gather", "reduce_scatter")):
        widths = [one.get(part, 0.0) for one in numbers.values()]
        colour = GREY if part == "compute" else hue(index - 1)
        axes.barh([labels[run] for run in numbers], widths, left=left, color=colour, label=part.replace("_", "-"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_title("seconds of a training step, 62 M parameters, uncompressed")
    figure.legend(loc="outside lower left", ncols=3)


PICTURES = {
    "overview": Picture(
        "Left: a training step with int8 gradients and parameters by the speed of the link. Middle: reading a prompt "
        "of a pretrained chat model, calibrated. Right: what pruning costs that model without any training.",
        _overview,
        _draw_overview,
        "README.md",
        (11.0, 3.4),
    ),
    "links": Picture(
        "How much faster a training step becomes when fewer bytes cross a slow link; a fast one gains nothing.",
        _links,
        lambda figure, numbers: _draw_links(figure.subplots(), numbers),
        "bench.md",
        (6.4, 3.4),
    ),
    "two_levels": Picture(
        "Two hosts of two ranks, 100 Mbit/s between them: what crosses the link, and how long a step takes, when the "
        "ranks are one group, when each host holds a sharded copy, and when each rank holds a whole one.",
        _two_levels,
        _draw_two_levels,
        "gradient_compression.md",
        (8.4, 3.6),
    ),
    "answers": Picture(
        "Which of a chat model's right answers to facts planted in prompts of up to 3,000 tokens stay right, and how "
        "much faster the prompt could be read, by who chooses what stays. Bars are 95 % intervals.",
        _kept,
        _draw_kept,
        "token_pruning.md",
        (7.2, 3.4),
    ),
    "needed": Picture(
        "Few layers look up what is asked for: by their attention a few percent of the prompt hold 95 % of the "
        "answers, by that of others nearly all of it must stay. A pretrained chat model, planted facts.",
        _needed,
        _draw_needed,
        "real_model.md",
    ),
    "weights": Picture(
        "What pruned weights cost a pretrained chat model without any training, on two texts.",
        _real,
        lambda figure, numbers: _draw_real(figure.subplots(), numbers),
        "real_model.md",
    ),
    "recall": Picture(
        "Which facts of a prompt a small model still answers, by who chooses the tokens that stay.",
        _recall,
        _draw_recall,
        "token_pruning_small_models.md",
    ),
    "importances": Picture(
        "Which heads and channels go decides what is lost: eight importances with three ways to divide the budget.",
        _importances,
        _draw_importances,
        "structured_pruning.md",
    ),
    "patterns": Picture(
        "What each pattern of zeros costs after the same fine-tuning of a small model; lines are seeds.",
        _patterns,
        _draw_patterns,
        "block_sparsity.md",
        (6.4, 2.4),
    ),
    "profile": Picture(
        "Where a training step's seconds go, uncompressed: computing and each collective.",
        _profile,
        _draw_profile,
        "pretraining.md",
        (6.4, 2.4),
    ),
}


def gallery() -> str:
    """All pictures in Markdown, for a page in `docs/`."""
    parts = [
        f"### {name.replace('_', ' ').capitalize()}\n\n![{picture.shows}](pictures/{name}.png)\n\n{picture.shows} "
        f"[Numbers](results/{picture.page})"
        for name, picture in PICTURES.items()
    ]
    return "\n\n".join(parts)


def _digest(numbers: Numbers) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def drifted(root: Path, records: Path) -> Iterator[tuple[Path, Picture, Numbers]]:
    """The pictures that were not drawn from the numbers that the records have now, and those numbers."""
    for name, picture in PICTURES.items():
        path, numbers = root / FOLDER / f"{name}.png", picture.take(records)
        if _drawn_from(path) != _digest(numbers):
            yield path, picture, numbers


def _drawn_from(path: Path) -> str | None:
    """The digest that a picture carries; None without a picture."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Numbers")


def write(path: Path, picture: Picture, numbers: Numbers) -> None:
    """Draw a picture into a PNG file that carries the digest of its numbers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=picture.size, layout="constrained", dpi=_DPI)
        picture.draw(figure, numbers)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": None, "Numbers": _digest(numbers)}
        FigureCanvasAgg(figure).print_png(path, metadata=metadata, pil_kwargs={"optimize": True})
