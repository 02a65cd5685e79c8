"""Every run with the command that repeats it."""

import shlex
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from bench.report.content import Markings, Section, Sheet
from bench.report.evidence import Evidence, run_name, shared
from bench.report.values import Record, text
from common.records.schema import OPTIONAL, REQUIRED
from common.tables import NOT_RECORDED, Table, cell

_LEAD = (
    "One entry per run: the command that repeats it and what it recorded. What is equal in all runs, and machines and "
    "versions, stand once, above. The whole record, configuration included, is in the results file."
)
_LONG = {"config", "command", "trace", "val_curve"}
_LONG |= {
    "prefill",
    "prefill_memory",
    "token_quality",
    "survival",
    "structure",
    "inference",
    "tiers",
    "calibration",
    "ladder",
}  # shown elsewhere
_SURROUNDINGS = ("machine", "versions")  # long, and the same in many runs
_DETAIL = Markup(
    '<details class="run"><summary>{name} <span class="quiet">{about}</span></summary>\n'
    "<p>{origin}</p>\n<pre><code>{command}</code></pre>\n<dl>{fields}</dl></details>\n"
)


def section(evidence: Evidence) -> Section | None:
    """Collapsible details of each run; None without runs."""
    if not evidence.runs:
        return None
    names = list(dict.fromkeys(name for run in evidence.runs for name in run if name not in _LONG))
    equal = shared(evidence.runs, names) if len(evidence.runs) > 1 else {}
    rows = [[_label(name), equal[name]] for name in names if equal.get(name) is not None]
    said = f"{len(rows)} fields are the same in all {len(evidence.runs)} runs."
    sheet = Sheet("shared-fields", "Equal in all runs", Table(["field", "value"], rows), verdict=said)
    labels = {name: _label(name) for name in names if name not in equal}
    places = _numbered(evidence.runs, [name for name in _SURROUNDINGS if name in labels])
    table = Table(["name", "recorded"], [[place, shown] for (_, shown), place in places.items()])
    said = f"{len(places)} different ones."
    surroundings = [Sheet("surroundings", "Machines and versions", table, verdict=said)] if places else []
    details = Markup("").join(_detail(run, labels, places) for run in evidence.runs)
    return Section("runs", "Runs", _LEAD, [*([sheet] if rows else []), *surroundings, Markings(details)])


def _numbered(runs: Sequence[Record], names: Sequence[str]) -> dict[tuple[str, str], str]:
    """A short name, such as "machine 2", for each field and text that any run recorded in it."""
    places: dict[tuple[str, str], str] = {}
    for name in names:
        found = dict.fromkeys(cell(run[name]) for run in runs if run.get(name))
        places |= {(name, shown): f"{name} {number}" for number, shown in enumerate(found, start=1)}
    return places


def _detail(run: Record, labels: Mapping[str, str], places: Mapping[tuple[str, str], str]) -> Markup:
    fields, missing = [], []
    for name, label in labels.items():
        if run.get(name) is not None:
            shown = cell(run[name])
            fields.append(f"<dt>{escape(label)}</dt><dd>{escape(places.get((name, shown), shown))}</dd>")
        elif name in run or name in REQUIRED:
            missing.append(name)
    if missing:
        fields.append(f"<dt>{NOT_RECORDED}</dt><dd>{escape(', '.join(missing))}</dd>")
    seed = None if run.get("seed") is None else str(run["seed"])  # a name, not a quantity: digits are not grouped
    method = run.get("compress_method")  # of training runs
    about = ", ".join([*([text(method)] if method else []), f"seed {text(seed)}", text(run.get("date"))])
    origin, lines = command(run)
    return _DETAIL.format(name=run_name(run), about=about, origin=origin, command=lines, fields=Markup("".join(fields)))


def _label(name: str) -> str:
    known = REQUIRED.get(name) or OPTIONAL.get(name)
    return f"{name} ({known.unit})" if known and known.unit else name


def command(run: Record) -> tuple[str, str]:
    """Where the command comes from, in words, and the lines to type in a checkout of the repository."""
    commit, dirty = run.get("git_commit"), run.get("git_dirty")
    checkout = [f"git checkout {shlex.quote(commit)}"] if isinstance(commit, str) else []
    caveat = " The code that ran differed from that commit." if dirty else ""
    if isinstance(run.get("command"), str):
        return f"Command as recorded.{caveat}", "\n".join([*checkout, run["command"]])
    if not isinstance(run.get("config"), str):
        return "Neither command nor configuration is recorded.", "not recorded"
    name = shlex.quote(run_name(run))
    lines = [*checkout, f"python -m bench configuration RESULTS.jsonl {name} > run.yaml"]
    lines.append(f"python main.py {'fit' if run.get('steps_measured') else 'validate'} --config run.yaml")
    origin = "No command is recorded; these lines start the recorded configuration again."
    nodes = _nodes(run["config"])
    if nodes > 1:
        origin += f" It ran on {nodes} hosts: start the last line on each (torchrun or python -m bench link)."
    return origin + caveat, "\n".join(lines)


def _nodes(config: str) -> int:
    """`trainer.num_nodes` of a saved configuration."""
    found = [line.split(":")[1].strip() for line in config.splitlines() if line.startswith("  num_nodes:")]
    return int(found[0]) if found and found[0].isdigit() else 1
