"""Where all numbers come from."""

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence
from common.tables import Table

_LEAD = (
    "Every table and picture names its origins by number. Check out the commit and run the command to measure it "
    "again; “with local changes” means that the code differed from its commit."
)


def section(evidence: Evidence) -> Section | None:
    """The table of origins; None without records."""
    table = evidence.provenance.table()
    if not table.rows:
        return None
    commits, machines = (len({row[place] for row in table.rows}) for place in (1, 2))
    said = f"{len(table.rows)} origins: {commits} commits, {machines} machines."
    shown = Table(table.headers, [[str(row[0]), *row[1:]] for row in table.rows])
    return Section("origins", "Origins", _LEAD, [Sheet("origins", "Origins", shown, verdict=said, anchors="origin")])
