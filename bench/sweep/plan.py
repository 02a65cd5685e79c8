"""What a sweep consists of: a matrix of runs of `main.py fit`, each with a key that says what was run."""

import fnmatch
import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.experiments.runs import ROOT
from bench.network import link as links

# Choices that place a run instead of being an argument of main.py.
PLACEMENT = ("world_size", "link", "delay", "ranks_per_host")
Choices = Mapping[str, Mapping[str, Any]]
Filter = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: Its labels, one an axis, joined by "/".
        axes: Label by axis.
        base: Configuration, relative to the repository.
        arguments: Arguments of `main.py fit` beyond the configuration, as they were given.
        world_size: Ranks; None leaves it to the configuration.
        link: Rate of the link between hosts; None runs all ranks on this machine.
        delay: One-way delay of that link.
        key: Hash of everything but the labels.
        ranks_per_host: Ranks on each host of that link.
    """

    name: str
    axes: dict[str, str]
    base: str
    arguments: tuple[str, ...]
    world_size: int | None
    link: str | None
    delay: str | None
    key: str
    ranks_per_host: int = 1

    def placed(self, emulated: bool, node_size: int | None = None) -> list[str]:
        """Arguments that put ranks on their hosts on an emulated link, else on nodes of a cluster, or this machine."""
        if self.world_size is None:
            return []
        devices = self.ranks_per_host if emulated else min(self.world_size, node_size or self.world_size)
        return [f"--trainer.num_nodes={self.world_size // devices}", f"--trainer.devices={devices}"]

    def main_arguments(self, emulated: bool, node_size: int | None = None) -> list[str]:
        """What follows `main.py fit`; see ``placed``."""
        return ["--config", self.base, *self.placed(emulated, node_size), *self.arguments]

    def link_arguments(self) -> list[str]:
        """What follows `python -m bench` when the link is emulated, up to the command."""
        delay = ["--delay", self.delay] if self.delay else []
        ranks = ["--ranks_per_host", str(self.ranks_per_host)] if self.ranks_per_host > 1 else []
        hosts = (self.world_size or 0) // self.ranks_per_host
        return ["link", "--rate", str(self.link), "--hosts", str(hosts), *ranks, *delay, "--"]

    def command(self, emulated: bool) -> str:
        """The command that repeats the run from the repository's root."""
        prefix = ["python", "-m", "bench", *self.link_arguments()] if emulated else []
        return shlex.join([*prefix, "python", "main.py", "fit", *self.main_arguments(emulated)])


def _labelled(axis: str, values: Any) -> dict[str, dict[str, Any]]:
    """An axis as choices by label; a list of values is short for choices of the argument the axis is named after."""
    if not values:
        raise ValueError(f"axes.{axis} is empty")
    if isinstance(values, list):
        return {value if isinstance(value, str) else f"{axis}={value}": {axis: value} for value in values}
    bad = [label for label, choice in values.items() if choice is not None and not isinstance(choice, dict)]
    if bad:
        raise ValueError(f"axes.{axis}.{bad[0]} must map arguments of main.py (or {', '.join(PLACEMENT)}) to values")
    return {str(label): choice or {} for label, choice in values.items()}


def _matches(axes: Mapping[str, str], wanted: Filter) -> bool:
    """Whether labels match a filter: for each axis a label, or several; `*` is anything, a leading `!` means not."""
    return all(any(_fits(axes[axis], label) for label in _list(labels)) for axis, labels in wanted.items())


def _fits(label: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(label, pattern.removeprefix("!")) != pattern.startswith("!")


def _list(labels: Any) -> list[str]:
    return [str(label) for label in (labels if isinstance(labels, list | tuple) else [labels])]


def _check_filters(filters: Sequence[Filter], choices: Mapping[str, Choices]) -> None:
    for wanted in filters:
        for axis, labels in wanted.items():
            if axis not in choices:
                raise ValueError(f"include/exclude: no axis {axis!r}; there are: {', '.join(choices)}")
            for label in _list(labels):
                if not fnmatch.filter(choices[axis], label.removeprefix("!")):
                    known = ", ".join(choices[axis])
                    raise ValueError(f"include/exclude: axis {axis} has no label {label!r}; there are: {known}")


def _token(argument: str, value: Any) -> str:
    return f"--{argument}={value if isinstance(value, str) else json.dumps(value)}"


def _merge(axes: Mapping[str, str], choices: Mapping[str, Choices], common: Mapping[str, Any]) -> dict[str, Any]:
    """All choices of one run; an axis may override what is common, but not another axis."""
    chosen: dict[str, Any] = {}
    for axis, label in axes.items():
        twice = chosen.keys() & choices[axis][label].keys()
        if twice:
            raise ValueError(f"axes.{axis}.{label} sets {', '.join(sorted(twice))}, which another axis sets too")
        chosen |= choices[axis][label]
    return {**{name: value for name, value in common.items() if name not in chosen}, **chosen}


def _place(name: str, chosen: dict[str, Any]) -> tuple[int | None, str | None, str | None, int]:
    """Take world size, link, delay and ranks of a host out of a run's choices and check them."""
    world_size, link, delay, ranks = (chosen.pop(choice, None) for choice in PLACEMENT)
    if world_size is not None and (not isinstance(world_size, int) or world_size < 1):
        raise ValueError(f"{name}: world_size must be a whole number of ranks, got {world_size!r}")
    if link is not None:
        links.rate_bits_per_s(str(link))
        world_size = 2 * (ranks or 1) if world_size is None else world_size
        if world_size < 2:
            raise ValueError(f"{name}: a link needs at least two ranks, got world_size {world_size}")
    elif delay is not None or ranks is not None:
        raise ValueError(f"{name}: {'delay' if ranks is None else 'ranks_per_host'} without link")
    ranks = 1 if ranks is None else ranks
    if not isinstance(ranks, int) or ranks < 1 or (link and (world_size % ranks or world_size < 2 * ranks)):
        raise ValueError(f"{name}: ranks_per_host {ranks!r} does not make two or more hosts of {world_size} ranks")
    placed = [argument for argument in ("trainer.devices", "trainer.num_nodes") if argument in chosen]
    if placed and world_size is not None:
        raise ValueError(f"{name}: {placed[0]} and world_size (or link) contradict each other; give world_size alone")
    return world_size, link, delay, ranks


def plan(
    base: str,
    axes: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    include: Sequence[Filter] = (),
    exclude: Sequence[Filter] = (),
    extra: Sequence[str] = (),
) -> list[Run]:
    """All runs of a sweep, the last axis varying fastest.

    Args:
        base: Configuration of `main.py fit`, relative to the repository.
        axes: Choices by label by axis, or a list of values of the argument that the axis is named after.
        arguments: Arguments of every run.
        include: Where given, only runs that match one of these filters (labels by axis).
        exclude: Runs that match one of these are left out.
        extra: Arguments of every run as typed on a command line; they come last.

    Raises:
        ValueError: An axis, label, link or world size is impossible, or two runs would be the same.
        FileNotFoundError: There is no such configuration.
    """
    if not (ROOT / base).is_file():
        raise FileNotFoundError(f"base: no configuration {base} in the repository")
    content = yaml.safe_load((ROOT / base).read_text())
    choices = {axis: _labelled(axis, values) for axis, values in axes.items()}
    _check_filters([*include, *exclude], choices)
    runs: dict[str, Run] = {}
    for labels in itertools.product(*choices.values()):
        labelled = dict(zip(choices, labels, strict=True))
        if any(_matches(labelled, wanted) for wanted in exclude):
            continue
        if include and not any(_matches(labelled, wanted) for wanted in include):
            continue
        name = "/".join(labels)
        chosen = _merge(labelled, choices, arguments or {})
        world_size, link, delay, ranks = _place(name, chosen)
        tokens = (*(_token(argument, value) for argument, value in chosen.items()), *extra)
        placed = [world_size, link, delay, *([ranks] if ranks > 1 else [])]
        resolved = json.dumps([content, tokens, *placed], default=str)
        key = hashlib.sha256(resolved.encode()).hexdigest()[:16]
        same = next((run.name for run in runs.values() if run.key == key or run.name == name), None)
        if same:
            raise ValueError(f"runs {same} and {name} are the same")
        runs[key] = Run(name, labelled, base, tokens, world_size, link, delay, key, ranks)
    if not runs:
        raise ValueError("the sweep has no run: include and exclude leave nothing over")
    return list(runs.values())


def select(runs: Sequence[Run], only: str | None) -> list[Run]:
    """The runs whose name matches one of the patterns, separated by commas; `*` stands for anything.

    Raises:
        ValueError: None does.
    """
    if only is None:
        return list(runs)
    chosen = [run for run in runs if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in only.split(","))]
    if not chosen:
        raise ValueError(f"no run matches {only!r}; the first of {len(runs)} is {runs[0].name!r}")
    return chosen


def located(arguments: Sequence[str], folder: Path) -> list[str]:
    """Arguments for a run that works in another folder: values that name a file below `folder` become absolute."""

    def locate(text: str) -> str:
        option, equals, value = text.rpartition("=") if text.startswith("--") else ("", "", text)
        looks_like_path = "/" in value or Path(value).suffix in (".yaml", ".json", ".jsonl", ".txt")
        if value and looks_like_path and not value.startswith(("/", "{", "[")) and (folder / value).exists():
            return f"{option}{equals}{(folder / value).resolve()}"
        return text

    return [locate(text) for text in arguments]
