"""The records of a report by kind, with everything in them that could not be read."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from bench.network import bounds
from bench.report.groups import Group, group
from bench.report.link import link_rate
from bench.report.palette import Colours
from bench.report.provenance import Provenance
from bench.report.values import Record, count, text
from bench.tables import figures
from common.records import record
from common.records.schema import OPTIONAL, REQUIRED

Parsed = TypeVar("Parsed")
_FLAWS = {"run": " without run_name", "figure": " with missing or mistyped fields"}
_RESULTS = ("step_time_ms_p50", "val_ppl", "train_loss", "bytes_compressed_total")
_TRAINING = ("compress_method", "train_loss")  # neither of which a run has that only validated
_OTHER = ("structure", "tiers", "recovery", "token_quality", "ladder", "calibration")  # runs of another feature


@dataclass
class Evidence:
    """What the sections of a report are made from.

    Attributes:
        runs: Records of finished runs.
        figures: The newest record of each figure (measured against target).
        failures: Records of runs that failed.
        collectives: Records of collective timings.
        problems: What was skipped or not understood, in words.
        against: The evidence of another results file that this one is compared with; None without.
    """

    runs: list[Record] = field(default_factory=list)
    figures: list[Record] = field(default_factory=list)
    failures: list[Record] = field(default_factory=list)
    collectives: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    against: "Evidence | None" = None

    @property
    def records(self) -> list[Record]:
        """Everything that is shown."""
        return [*self.figures, *self.runs, *self.failures, *self.collectives]

    @cached_property
    def provenance(self) -> Provenance:
        """Where the numbers come from."""
        return Provenance(self.records)

    @cached_property
    def experiments(self) -> dict[str, list[Record]]:
        """Figures by the experiment that measures them, "" where the command names none."""
        found: dict[str, list[Record]] = defaultdict(list)
        for one in self.figures:
            found[figures.experiment(one)].append(one)
        return dict(found)

    def figures_of(self, name: str) -> list[Record]:
        """The figures of an experiment."""
        return self.experiments.get(name, [])

    @cached_property
    def groups(self) -> list[Group]:
        """Training runs grouped over seeds; those that pruned something are no measure of how gradients are sent."""
        trained = [run for run in self.runs if any(run.get(name) is not None for name in _TRAINING)]
        trained = [run for run in trained if all(run.get(name) is None for name in _OTHER)]
        return group([run for run in trained if any(run.get(name) is not None for name in _RESULTS)])

    @cached_property
    def colours(self) -> Colours:
        """Colours of all methods."""
        return Colours(one.method for one in self.groups)

    def having(self, *names: str) -> list[Record]:
        """The runs that have one of these feature blocks."""
        return [run for run in self.runs if any(run.get(name) is not None for name in names)]

    def blocks(self, name: str, parse: Callable[[Any], Parsed]) -> list[tuple[str, Parsed]]:
        """Run name and parsed feature block of every run that has one; a block that cannot be read is a problem.

        Args:
            name: Field of the block, such as "tiers".
            parse: Makes something of the block; KeyError, TypeError, ValueError, IndexError or AttributeError when it
                has another shape.
        """
        found = []
        for run in self.runs:
            if run.get(name) is None:
                continue
            try:
                found.append((run_name(run), parse(run[name])))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                self.problems.append(
                    f"{run_name(run)}: block {name!r} not understood ({type(error).__name__}: {error})"
                )
        return found


def run_name(run: Record) -> str:
    """The run's name, "unnamed" without."""
    return text(run["run_name"]) if run.get("run_name") is not None else "unnamed"


def sort(records: Iterable[Record], broken: Sequence[str] = ()) -> Evidence:
    """Records by kind.

    Args:
        records: All readable records, in file order.
        broken: What is to be said of lines that were no records at all.
    """
    evidence, foreign = Evidence(), Counter[str]()
    evidence.problems += broken
    found: list[Record] = []
    for one in records:
        kind = one.get("kind", "run")
        if kind == "figure" and not record.check_types(one, figures.FIELDS) and figures.FIELDS.keys() <= one.keys():
            found.append(one)
        elif kind == "failure":
            evidence.failures.append(one)
        elif kind == "collectives":
            evidence.collectives.append(one)
        elif kind == "run" and "run_name" in one:
            evidence.runs.append(_readable(one, evidence.problems))
        else:
            foreign[text(kind) + _FLAWS.get(text(kind), "")] += 1
    if foreign:
        kinds = ", ".join(f"{number:,} of kind {kind}" for kind, number in foreign.most_common(8))
        kinds += ", …" if len(foreign) > 8 else ""
        evidence.problems.append(f"{foreign.total():,} foreign record(s) skipped, none that a report shows: {kinds}")
    evidence.runs = _annotated(evidence.runs, evidence.problems)
    evidence.figures = _newest(found)
    return evidence


def measured_on(figure: Record) -> str:
    """The model that a figure is of; "" where it does not say."""
    model = (figure.get("details") or {}).get("model")
    return text(model) if model is not None else ""


def _newest(found: Sequence[Record]) -> list[Record]:
    """The newest record of each figure; those of two experiments or models are two, whatever they are called."""
    apart: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for one in found:
        apart[figures.experiment(one), measured_on(one)].append({"date": "", **one})
    return [one for some in apart.values() for one in figures.latest(some)]


def _annotated(runs: Sequence[Record], problems: list[str]) -> list[Record]:
    """The runs with their bounds, where the link's rate can be read."""
    odd = {id(run) for run in runs if run.get("link_rate") is not None and link_rate(run) is None}
    found = iter(bounds.annotate([run for run in runs if id(run) not in odd]))
    if odd:
        rates = sorted({text(run["link_rate"]) for run in runs if id(run) in odd})
        problems.append(f"{count(len(odd), 'run')} without bounds: no rate in link_rate {', '.join(rates[:8])}")
    return [run if id(run) in odd else next(found) for run in runs]


def _readable(run: Record, problems: list[str]) -> Record:
    """The run without the values that have the wrong type, which then count as not recorded."""
    wrong = record.check_types(run, {**REQUIRED, **OPTIONAL})
    if not wrong:
        return run
    problems.append(f"{run_name(run)}: " + "; ".join(wrong))
    bad = {complaint.split(" ", 1)[0] for complaint in wrong}
    return {name: None if name in bad else value for name, value in run.items()}


def shared(runs: Sequence[Record], fields: Iterable[str]) -> Mapping[str, Any]:
    """Those of the fields that have one and the same value in all runs."""
    return {name: runs[0].get(name) for name in fields if all(run.get(name) == runs[0].get(name) for run in runs)}
