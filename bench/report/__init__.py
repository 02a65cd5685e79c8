"""The report: a results file as one page that a person can read, with the numbers behind every drawing.

`evidence.py` sorts records and `groups.py` sums them up over seeds (no drawing); `features/` reads off what each of the
four features saves and costs, and says it in a sentence; `sections/` decides what is shown, one file a section;
`drawing.py`, `pareto.py` and `palette.py` draw; `columns.py` writes numbers, `provenance.py` says where they come from;
`page.py` and `export.py` write files.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

from markupsafe import Markup

from bench.report import export, page
from bench.report.evidence import Evidence, sort
from bench.report.provenance import links
from bench.report.sections import make
from bench.report.values import Record, count
from common.files import check_output
from common.records import record


def read(results: Path) -> tuple[Evidence, str]:
    """The evidence in a results file, or in all .jsonl files of a folder, and the names of the files.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no record in it.
    """
    files = _files(results)
    found: list[dict] = []
    broken: list[str] = []
    for path in files:
        records, lines = record.read(path)
        found += records
        broken += [record.passed_over(path, lines)] if lines else []
    if not found:
        why = f" ({'; '.join(broken)})" if broken else ""
        raise ValueError(f"{results}: no records to report{why}; runs append theirs through the RunRecord callback")
    return sort(found, broken), ", ".join(path.name for path in files)


def _files(results: Path) -> list[Path]:
    return sorted(results.glob("*.jsonl")) if results.is_dir() else [results]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within the block nothing is looked for in what is in memory: a thousand records stay to the end."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@_uncollected()
def build(
    results: Path,
    output: Path,
    tables: Path | None = None,
    figures: Path | None = None,
    overwrite: bool = False,
    against: Path | None = None,
) -> str:
    """Write the report of a results file; see `python -m bench report --help`.

    Returns:
        What was written, in a sentence.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no record in it, or none that this report knows; or a folder holds what Pare did not write;
            or two of the destinations are one, or one lies inside the other, or is what is read.
    """
    _check_apart({"output": output, "tables": tables, "figures": figures})
    _check_not_read(output, {"results": results, "against": against})
    for field, folder in (("tables", tables), ("figures", figures)):
        if folder is not None:
            check_output(folder, field, [results, against], overwrite)
    evidence, names = read(results)
    if against is not None:
        evidence.against, others = read(against)
        evidence.problems += [f"the other file: {problem}" for problem in evidence.against.problems]
        names += f"; compared with {others if others != names else against}"
    sections = make(evidence)
    if not (evidence.runs or evidence.figures or evidence.failures or evidence.collectives):
        raise ValueError(f"{results}: no records that a report can show: {'; '.join(evidence.problems)}")
    facts = {
        "Records": ", ".join(_counted(evidence)),
        "Read from": names,
        "Made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if evidence.problems:
        facts["Not understood"] = count(len(evidence.problems), "remark") + ", listed under failures"

    def origins(records: Sequence[Record]) -> Markup:
        return links(evidence.provenance.numbers(records))

    export.page(output, page.render("Pare report", sections, facts, origins))
    written = export.tables(tables, sections, overwrite) if tables else 0
    written += export.figures(figures, sections, overwrite) if figures else 0
    said = f"{output}: {output.stat().st_size / 1e6:.2f} MB, {', '.join(_counted(evidence))}"
    return said + (f"; {count(written, 'file')} of tables and figures" if written else "")


def _check_apart(destinations: Mapping[str, Path | None]) -> None:
    """Refuse destinations of which one would replace the other, whether anything is there yet or not."""
    given = [(field, path.expanduser().resolve()) for field, path in destinations.items() if path is not None]
    for (field, path), (other, there) in combinations(given, 2):
        if path == there or path in there.parents or there in path.parents:
            raise ValueError(
                f"{field} ({path}) and {other} ({there}) are one, or one lies inside the other; keep them apart"
            )


def _check_not_read(output: Path, sources: Mapping[str, Path | None]) -> None:
    """Refuse to write the page over records that it is made from."""
    for field, source in sources.items():
        for file in _files(source.expanduser()) if source is not None else []:
            if file.resolve() == output.expanduser().resolve():
                raise ValueError(
                    f"output ({output}) is {file}, whose records are read ({field}): the page would replace them; "
                    "choose another file for it"
                )


def _counted(evidence: Evidence) -> list[str]:
    kinds = {"run": evidence.runs, "figure": evidence.figures, "failed run": evidence.failures}
    said = [count(len(some), noun) for noun, some in kinds.items() if some]
    timed = len(evidence.collectives)
    return said + ([count(timed, "measurement of collectives", "measurements of collectives")] if timed else [])
