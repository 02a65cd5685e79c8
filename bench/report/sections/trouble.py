"""Runs that failed, and what in the records could not be read."""

from markupsafe import Markup

from bench.report.content import Block, Markings, Section, Sheet
from bench.report.evidence import Evidence, run_name
from bench.report.values import Record, count, text
from common.tables import Table

_MAX_PROBLEMS = 100


def section(evidence: Evidence) -> Section | None:
    """Failures with their error text, and problems; None when there are neither."""
    if not evidence.failures and not evidence.problems:
        return None
    blocks: list[Block] = []
    finished = {run_name(run) for run in evidence.runs}
    if evidence.failures:
        rows = [
            [run_name(f), f.get("exit_status"), run_name(f) in finished, f.get("date"), f.get("command"), _error(f)]
            for f in evidence.failures
        ]
        headers = ["run", "exit status", "succeeded another time", "date", "command", "error"]
        said = f"{sum(row[2] is True for row in rows)} of {len(rows)} succeeded another time."
        blocks.append(Sheet("failures", "Failed runs", Table(headers, rows), verdict=said, records=evidence.failures))
    if evidence.problems:
        shown = evidence.problems[:_MAX_PROBLEMS]
        items = Markup("").join(Markup("<li>{}</li>").format(problem) for problem in shown)
        more = len(evidence.problems) - len(shown)
        items += Markup("<li>and {} more</li>").format(more) if more else ""
        blocks.append(Markings(Markup("<h4>Not understood in the records</h4>\n<ul>{}</ul>").format(items)))
    lead = f"{count(len(evidence.failures), 'failed run')}, {count(len(evidence.problems), 'remark')} on the records."
    return Section("trouble", "Failures and skipped lines", lead, blocks)


def _error(failure: Record) -> str | None:
    """The error's text as it was, line breaks included."""
    error = failure.get("error")
    return None if error is None else error if isinstance(error, str) else text(error)
