"""`python -m bench COMMAND`: check the environment, emulate links, run experiments, publish records, make reports."""

import importlib
import inspect
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, auto_cli
from rich.console import Console

from bench import experiments
from bench import memory as estimates
from bench.gpu import gpu
from bench.network import bounds as limits
from bench.network import link as links
from bench.network.collectives_command import collectives
from bench.sweep import sweep
from bench.tables import compare as comparison
from bench.tables import documents, figures
from bench.tables import pivot as pivots
from bench.tour import tour
from common import moved
from common.files import write_text
from common.front import screens
from common.front.forms import Forms, unknown
from common.output import Refused, one_object, quiet, silent, steady
from common.records import record
from common.tables import Table
from common.trace import summary as trace_summary

console = Console()


class Parser(ArgumentParser):
    """Parser in which a switch is `--markdown`, not `--markdown true`."""

    def add_argument(self, *args, **kwargs):
        """Add an argument: switches for one of type bool, `--output` also as `-o`, `file` by its place."""
        if args == ("--output",):
            args = ("-o", "--output")
        if args == ("--file",):
            args, kwargs = ("file",), {**kwargs, "nargs": "?"}
        if kwargs.get("type") is bool:
            del kwargs["type"]
            kwargs["action"] = ActionYesNo
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See ``ArgumentParser.error``; says what is wrong, in one line, and exits with status 2."""
        if not self.exit_on_error:  # a parser inside another: the outer one explains
            super().error(message, ex)
        program = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        print(f"error: {message}\nhelp: {program} --help", file=sys.stderr)
        raise Refused(message)


_found: list[Any] = []  # what the command found, for `--json`


def _show(table: Table, markdown: bool) -> None:
    _found.append({"title": table.title, "headers": [*table.headers], "rows": [_plain(row) for row in table.rows]})
    if markdown:
        print(table.markdown(), end="")
    else:
        console.print(table)


def _plain(value: Any) -> Any:
    """A value of JSON, which knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _read(path: Path) -> list[dict]:
    records, broken = record.read(path)
    if broken:
        print(record.passed_over(path, broken), file=sys.stderr)
    return records


def compare(results: Path, runs: str | None = None, fields: str | None = None, markdown: bool = False) -> None:
    """Show run records side by side; what was not measured says "not recorded".

    Args:
        results: The results.jsonl file.
        runs: Names of the runs to show, separated by commas; all without.
        fields: Fields to show, separated by commas, dots reaching into blocks ("machine.cpu").
        markdown: Print a Markdown table.
    """
    chosen = comparison.select(_read(results), runs.split(",") if runs else None)
    _show(comparison.compare(chosen, fields.split(",") if fields else comparison.DEFAULT_FIELDS), markdown)


def table(file: Path | None = None, only: str | None = None, check: bool = False) -> int:
    """Write tables and pictures in documents anew from their records, or show one file's figures.

    Args:
        file: The .jsonl file with the figures to show; without it, the documents are written.
        only: Identifiers of the figures to show, separated by commas, `*` for anything; all without.
        check: Write nothing; the exit status is 1 when a document differs from its records.
    """
    from bench.tables import pictures  # drawing takes a second to import, which no other command needs

    if file is not None:
        print(figures.render_table(_read(file), only.split(",") if only else None), end="")
        return 0
    root, records = documents.ROOT, documents.ROOT / documents.RECORDS
    texts = documents.drifted(root)
    drawings = list(pictures.drifted(root, records))
    if not check:
        for path, text in texts.items():
            write_text(path, text)
        for path, picture, numbers in drawings:
            pictures.write(path, picture, numbers)
    for path in (*texts, *(path for path, _, _ in drawings)):
        name = path.relative_to(root)
        print(
            f"{name} differs from its records: python -m bench table" if check else f"{name} written", file=sys.stderr
        )
    return 1 if check and (texts or drawings) else 0


def pivot(
    records: Path,
    rows: str,
    column: str,
    values: str,
    where: str = "",
    repeat: str = "seed",
    markdown: bool = False,
) -> None:
    """Show values of many records by row and column, mean ± sd over repeats.

    Args:
        records: The .jsonl file.
        rows: Fields that make a row, separated by commas, such as compress_method; dots reach into blocks.
        column: Field whose values become columns, such as strategy.
        values: Fields to show, separated by commas; runs also have `limits.measured_over_model` and the rest of
            `bounds.annotate`.
        where: Only records with these values: "kind=wire,world_size=2".
        repeat: Field that differs between repeats of one measurement.
        markdown: Print a Markdown table.
    """
    chosen = pivots.where(limits.annotate(_read(records)), pivots.conditions(where))
    table, _ = pivots.pivot(chosen, rows.split(","), column, values.split(","), repeat)
    _show(table, markdown)


def trace(traces: Path, markdown: bool = False) -> None:
    """Say where the step time went: compute, communication by operator, overlap, idle.

    With --json, of every step.

    Args:
        traces: A Chrome trace of torch.profiler (.json or .json.gz), or a folder of them, one a rank.
        markdown: Print a Markdown table.
    """
    files = sorted([*traces.glob("*.json"), *traces.glob("*.json.gz")]) if traces.is_dir() else [traces]
    if not files:
        raise FileNotFoundError(f"no .json or .json.gz in {traces}")
    summaries = [trace_summary.summarise(path) for path in files]
    _show(trace_summary.table(*summaries), markdown)
    _found[:] = [_plain(summaries)]


def link(
    rate: str = "1gbit",
    hosts: int = 2,
    delay: str | None = None,
    report: Path | None = None,
    ranks_per_host: int = 1,
    command: list[str] | None = None,
) -> int:
    """Run a command as one rank on each of several emulated hosts.

    `python -m bench link --rate 1gbit -- COMMAND ...`. Needs root and iproute2. Ranks see the variables torchrun
    sets; so `trainer.num_nodes` is the number of hosts and `trainer.devices` is `ranks_per_host`. Lines of ranks
    other than 0 start with `[host i]`, or `[rank i]` where a host has several. Exits with the status of the first
    rank that failed.

    Args:
        rate: Rate of each host's cable in each direction: a number and kbit, mbit or gbit.
        hosts: Number of hosts.
        delay: One-way delay a host adds to what it sends, such as 1ms.
        report: JSON file for the bytes each host sent and received.
        ranks_per_host: Ranks on each host; between them the link is this machine's own.
        command: The command as a JSON list; typing it after `--` is the same.
    """
    return links.run(command or [], rate, hosts, delay, report, ranks_per_host)


def env(full: bool = False) -> int:
    """Check versions, machine, speed, and what really runs; exit status 1 when something is missing.

    Args:
        full: Also try torch.compile on each device, which takes 10 s and more.
    """
    from common.records import env as environment  # imports torch, which takes two seconds

    report = environment.check(full, {"link emulation": links.check})
    _found.append(_plain(report))
    console.print(*environment.tables(report), sep="\n")
    return 1 if report["missing"] else 0


_FORMS = {"model": "FOLDER", "texts": "NAME=FILE,NAME=FILE", "pruner": "FOLDER", "official": "FOLDER"}


def experiment(
    name: str,
    records: Path | None = None,
    folder: Path | None = None,
    model: Path | None = None,
    texts: str | None = None,
    pruner: Path | None = None,
    official: Path | None = None,
) -> None:
    """Run one experiment and append its figures to a records' file.

    Args:
        name: Name of a file in bench/experiments.
        records: Where the figures go; by default the file in docs/results/records that the experiment names. A file
            with its figures of another model is refused.
        folder: Working folder of the runs; by default a temporary one that is removed.
        model: Hugging Face folder of the model to experiment on, for experiments that need one.
        texts: Texts for experiments that need them: NAME=FILE,NAME=FILE.
        pruner: What `calibrate` found for the model, for experiments that need it.
        official: Checkout of the authors' code, for experiments that compare with it.
    """
    if name not in experiments.names():
        raise ValueError(f"no experiment {name!r}; there are: {', '.join(experiments.names())}")
    module = importlib.import_module(f"bench.experiments.{name}")
    named = dict(pair.split("=", 1) for pair in (texts or "").split(",") if "=" in pair)
    given = {
        "model": model and model.resolve(),
        "texts": {text: Path(path).resolve() for text, path in named.items()} or None,
        "pruner": pruner and pruner.resolve(),
        "official": official and official.resolve(),
    }
    known = inspect.signature(module.run).parameters
    for option, value in given.items():
        needed = option in known and known[option].default is inspect.Parameter.empty
        if (value is None and needed) or (value is not None and option not in known):
            problem = f"needs --{option} {_FORMS[option]}" if needed else f"takes no --{option}"
            raise ValueError(f"experiment {name} {problem}")
    options = {option: value for option, value in given.items() if value is not None}
    records = records or documents.ROOT / documents.RECORDS / module.RECORDS
    if model is not None:
        _check_records(records, name, model.resolve().name, getattr(module, "ROLES", ()))
    with tempfile.TemporaryDirectory() as temporary:
        module.run(records.resolve(), (folder or Path(temporary)).resolve(), **options)
    table(records)


def _check_records(records: Path, name: str, model: str, roles: Sequence[str]) -> None:
    """Refuse a file with an experiment's figures of another model, for which the newest of a name would stand.

    Args:
        records: The file.
        name: Name of the experiment.
        model: Name of the model's folder.
        roles: What the experiment's figures call models that are no folder.
    """
    found = [one for one in _read(records) if figures.experiment(one) == name] if records.exists() else []
    others = {of for one in found if (of := one["details"].get("model")) not in (None, model, *roles)}
    if others:
        raise ValueError(
            f"{records} has figures of {', '.join(sorted(others))}, and these would be of {model}: give another "
            "file (--records runs/mine.jsonl)"
        )


def report(
    results: Path,
    output: Path = Path("report.html"),
    tables: Path | None = None,
    figures: Path | None = None,
    overwrite: bool = False,
    against: Path | None = None,
) -> None:
    """Make one self-contained HTML file of a results file: what was compared, and what it cost.

    Args:
        results: The results.jsonl file, or a folder of such files.
        output: The HTML file to write.
        tables: Folder for every table of the report as Markdown and CSV.
        figures: Folder for every chart of the report as PNG and SVG.
        overwrite: Replace the two folders also where Pare did not write them.
        against: Another results file, or a folder of such files, to compare with: what changed beyond noise.
    """
    from bench import report as reports  # drawing takes a second to import, which no other command needs

    print(reports.build(results, output, tables, figures, overwrite, against))
    _found.append({"output": str(output)})


def configuration(results: Path, run: str) -> None:
    """Print the configuration that a recorded run was started with, to start it again.

    Args:
        results: The results.jsonl file.
        run: Name of the run; of several the newest.
    """
    found = comparison.select(_read(results), [run])[-1].get("config")
    if not isinstance(found, str):
        raise ValueError(f"{results}: run {run!r} has no configuration recorded")
    print(found, end="" if found.endswith("\n") else "\n")
    _found.append(found)


def bounds(results: Path, rate: str | None = None, markdown: bool = False) -> None:
    """Show what each run could take at best, beside what it took.

    That is compute and bytes over bandwidth. Compute time comes from a run of the same work on one rank, where the
    file has one, else from the run's own steps without communication, encoding and decoding.

    Args:
        results: The results.jsonl file.
        rate: Rate between ranks, such as 10gbit, for runs that were not on a link of known rate.
        markdown: Print a Markdown table.
    """
    bytes_per_s = links.rate_bits_per_s(rate) / 8 if rate else None
    _show(limits.table(_read(results), bytes_per_s), markdown)


def memory(
    models: str,
    ranks: str = "1,8",
    engine: estimates.Engine = "fsdp",
    residual: estimates.Residual = "none",
    bf16: bool = False,
    markdown: bool = False,
) -> None:
    """Show what training holds in each rank's memory, from the model's shapes; nothing is loaded.

    Args:
        models: Hugging Face folders or hub names, or llama-1b, llama-8b, llama-70b; separated by commas.
        ranks: Numbers of ranks, separated by commas.
        engine: "fsdp" (everything sharded) or "ddp".
        residual: How error feedback stores what it owes; "none" without error feedback.
        bf16: Whether parameters are gathered in bfloat16 (bf16-mixed).
        markdown: Print a Markdown table.
    """
    counts = [int(count) for count in ranks.split(",")]
    _show(estimates.table(models.split(","), counts, engine, residual, 2 if bf16 else 4), markdown)


def plan(
    configuration: Path | None = None,
    world_size: int = 1,
    node_size: int = 8,
    rate: str | None = None,
    backend: Literal["gloo", "nccl"] | None = None,
    step: int = 100_000,
    markdown: bool = False,
    command: list[str] = [],  # noqa: B006 - never changed; jsonargparse shows it as the default
) -> None:
    """Say what each rank of a cluster will hold and send, by a configuration.

    `python -m bench plan --config … --world_size 64 --node_size 8`. By the engine's own code on tensors without
    memory: no weight is read, no text, and no rank has to be there. Not counted are activations, which depend on the
    length, and what libraries take for themselves. Arguments of `fit` after `--` are added to the configuration's.

    Args:
        configuration: Of `main.py fit`; `--config` is the same. Its number of devices and nodes does not matter.
        world_size: Ranks in all.
        node_size: Ranks of a node.
        rate: Rate of a node's link to the others, such as 10gbit: adds the time that bytes between nodes take.
        backend: Who moves bytes; by default gloo where the configuration computes on the CPU, else nccl.
        step: Optimizer steps made before the one that is planned, for methods that go by them.
        markdown: Print a Markdown table.
        command: Arguments of fit as a JSON list; typing them after `--` is the same.
    """
    from bench import planning  # reads the whole command line of main.py, which no other command needs

    if configuration is None:
        raise ValueError("plan: give a configuration of main.py fit, --config configs/….yaml")
    found = planning.plan(configuration, world_size, node_size, backend, step, command)
    _show(found.table(rate), markdown)
    _found[:] = [_plain(found.as_dict())]


_PROGRAM, _HELP = "python -m bench", {"-h", "--help"}
_COMMANDS: dict[str, Any] = {
    command.__name__: command
    for command in (
        tour,
        sweep,
        compare,
        pivot,
        bounds,
        report,
        configuration,
        trace,
        plan,
        memory,
        link,
        collectives,
        env,
        gpu,
        experiment,
        table,
    )
}


def _overview() -> str:
    """All commands, a line each."""
    does = {name: (inspect.getdoc(command) or "").splitlines()[0] for name, command in _COMMANDS.items()}
    lines = [
        f"usage: {_PROGRAM} COMMAND [options]",
        "",
        "Measure what making a language model cheaper costs, and show it.",
        "",
        *(f"  {name:<14} {said}" for name, said in does.items()),
        "",
        *screens.rows((*screens.OUTPUT_FORMS, ("COMMAND --help", "what a command takes"))),
        "",
        screens.STATUS,
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. `--json` and `--quiet` stand anywhere before a `--`."""
    forms, arguments = Forms.of(list(sys.argv[1:] if argv is None else argv))
    name = arguments[0] if arguments else ""
    if old := moved.hint(arguments):
        return forms.refuse(name, old.strip(), f"{_PROGRAM} {name} --help", status=1)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if name in _HELP:
        print(_overview())
        return 0
    if not own or (not name.startswith("-") and name not in _COMMANDS):
        return forms.refuse(name, unknown(name, _COMMANDS), f"{_PROGRAM} --help")
    if not forms.json or _HELP & set(own):
        # a configuration that was asked for is no progress
        with silent(forms.quiet, stdout=name != "configuration"):
            return _run(arguments)[0]
    _found.clear()
    with one_object(name) as answer, silent(forms.quiet):
        answer["status"], answer["error"] = _run(arguments)
        answer["result"] = _found[0] if len(_found) == 1 else _found or None
        status: int = answer["status"]
    return status


def _run(arguments: list[str]) -> tuple[int, str | None]:
    """Exit status, and what went wrong."""
    if "--" in arguments:
        split = arguments.index("--")
        arguments[split:] = [f"--command={json.dumps(arguments[split + 1 :])}"]
    if arguments[:1] == ["plan"]:  # a configuration of main.py, not one of this command's own arguments
        arguments = [re.sub(r"^--config(?==|$)", "--configuration", each) for each in arguments]
    # --dry-run is as good as --dry_run
    arguments = [re.sub(r"^--[a-z-]+", lambda option: "--" + option[0][2:].replace("-", "_"), a) for a in arguments]
    try:
        return auto_cli(_COMMANDS, args=arguments, prog=_PROGRAM, parser_class=Parser) or 0, None
    except (ValueError, OSError, links.LinkUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1, str(error)


if __name__ == "__main__":
    quiet()
    with steady():
        status = main()
    sys.exit(status)
