"""What the bytes are: gradient values, indices, scales, and gathered parameters."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from bench.report import drawing, palette
from bench.report.content import Chart, Section
from bench.report.evidence import Evidence
from bench.report.groups import Group, panels, representatives
from bench.report.values import Record, number
from common.tables import Table

_LEAD = (
    "Bytes a rank sends in one optimizer step, by what they encode, as counted at the collective call: after packing, "
    "with scales and indices, without the network's own headers. The dotted line is an ideal fp32 ring reduction."
)
_FIXED = ("values", "indices", "scales", "tables", "parameters")


def megabytes(run: Record) -> dict[str, float] | None:
    """Megabytes per step by role, "parameters" for those of parameter gathers; None where they were not counted."""
    steps, roles = number(run, "steps_measured"), run.get("bytes_by_role")
    if not steps or not isinstance(roles, dict):
        return None
    parameters = number(run, "bytes_parameters_total")
    found = {role: size for role in roles if (size := number(roles, role)) is not None}
    if parameters is not None:
        found["parameters"] = found.get("parameters", 0.0) + parameters
    return {role: size / steps / 1e6 for role, size in found.items()}


def section(evidence: Evidence) -> Section | None:
    """Stacked bars of bytes; None when nothing was sent."""
    found = []
    for panel in panels(evidence.groups, across=("link",)):
        bars: list[tuple[Group, dict[str, float]]] = []
        for group in representatives(panel):  # bytes do not depend on the link
            counted = [sizes for run in group.records if (sizes := megabytes(run))]
            names = dict.fromkeys(role for sizes in counted for role in sizes)
            if counted:
                bars.append((group, {r: sum(s.get(r, 0.0) for s in counted) / len(counted) for r in names}))
        if any(sum(sizes.values()) for _, sizes in bars):
            found.append((panel.title, bars))
    if not found:
        return None
    every = {role for _, bars in found for _, sizes in bars for role in sizes}
    roles = [*(role for role in _FIXED if role in every), *sorted(every - set(_FIXED))]
    shown = found[: drawing.MAX_PANELS]
    rows = [
        [title or "all", group.method, *(sizes.get(role, 0.0) for role in roles), sum(sizes.values()), _ideal(group)]
        for title, bars in found
        for group, sizes in bars
    ]
    headers = ["setting", "method", *(f"{role} (MB)" for role in roles), "all (MB)", "ideal fp32 ring, gradients (MB)"]
    title, least = min(
        ((title, bar) for title, bars in found for bar in bars if sum(bar[1].values())),
        key=lambda pair: sum(pair[1][1].values()),
    )
    chart = Chart(
        "bytes-by-role",
        "Bytes per step by role",
        f"Stacked bars of megabytes per step and rank by role ({', '.join(roles)}), one bar per method.",
        f"Fewest: {least[0].method}{f' ({title})' if title else ''} with {sum(least[1].values()):.3g} MB a step.",
        lambda figure: _draw(figure, shown, roles),
        Table(headers, rows),
        (8.0, 0.9 + sum(drawing.spread_out([len(bars) for _, bars in shown], [title for title, _ in shown]))),
        drawing.left_out(len(found)),
        [run for _, bars in found for group, _ in bars for run in group.records],
    )
    return Section("bytes", "What is sent", _LEAD, [chart])


def _ideal(group: Group) -> float | None:
    found = group.spread(lambda run: _per_step_mb(run, "bytes_raw_total"))
    return found.mean if found else None


def _per_step_mb(run: Record, field: str) -> float | None:
    size, steps = number(run, field), number(run, "steps_measured")
    return size / steps / 1e6 if size is not None and steps else None


def _draw(figure: Figure, shown: Sequence, roles: Sequence[str]) -> None:
    heights = drawing.spread_out([len(bars) for _, bars in shown], [title for title, _ in shown])
    axes = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0].tolist()
    for one, (title, bars) in zip(axes, shown, strict=True):
        left = [0.0] * len(bars)
        for index, role in enumerate(roles):
            widths = [sizes.get(role, 0.0) for _, sizes in bars]
            colour = palette.GREY if role == "parameters" else palette.hue(index)
            drawing.bars(one, range(len(bars)), widths, colour, left, 0.62, lying=True, label=role)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ideals = [ideal for group, _ in bars if (ideal := _ideal(group))]
        if ideals:
            one.axvline(max(ideals), color=palette.TEXT, linestyle=":", linewidth=1.2, label="ideal fp32 ring")
        one.set_yticks(range(len(bars)), [drawing.label(group.method) for group, _ in bars])
        one.grid(axis="y", visible=False)
        one.invert_yaxis()
        drawing.heading(one, title, 1)
        drawing.plain_numbers(one.xaxis)
    axes[-1].set_xlabel("sent per rank and step (MB)")
    drawing.legend(figure, axes, columns=6)
