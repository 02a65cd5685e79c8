"""Where the seconds of a step go."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture
from common.records import record


def _take(folder: Path) -> Numbers:
    """Seconds of a step in computing and in each collective, by run."""
    steps = {}
    for run in record.read(folder / "profile.jsonl")[0]:
        wire = {name: ms / run["steps_measured"] / 1e3 for name, ms in run["comm_time_ms_by_op"].items()}
        steps[run["run_name"]] = {"compute": run["step_time_ms_mean"] / 1e3 - sum(wire.values()), **wire}
    return steps


def _draw(figure: Figure, numbers: Numbers) -> None:
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


PICTURE = Picture(
    100,
    "Where a training step's seconds go, uncompressed: computing and each collective.",
    _take,
    _draw,
    "pretraining.md",
    (6.4, 2.4),
)
