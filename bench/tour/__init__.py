"""The tour: all of Pare on one model, command by command, to one table and one report.

`steps.py` says which commands, `running.py` runs them, `results.py` reads the table off the records they leave.
"""

import shlex
import sys
from pathlib import Path

from rich.console import Console

from bench.experiments.runs import claim
from bench.network.launch import StopRequested, stop_signals_raise
from bench.tour import results
from bench.tour.running import Ended, failed, is_done, run
from bench.tour.steps import RECORDS, Given, Step, plan
from common.files import write_text
from common.locks import lock
from common.progress import duration

TABLE = "table.md"


def tour(
    model: str | None = None,
    train: Path | None = None,
    val: Path | None = None,
    folder: Path | None = None,
    short: bool = False,
    dry_run: bool = False,
) -> int:
    """Run every feature once, command by command, to one table and one report.

    A compressed training, pruned prompts, fewer parameters and weights, and all together. Without a model it trains
    small ones and takes ten to fifteen minutes on two CPU cores; nothing is downloaded. With one it takes longer.
    Every step is a command that is shown and can be given by itself. What is done is not done
    again: the same command goes on after an interruption. A step that fails does not stop those that do not need it.
    Ends with a table, `table.md`, and `report.html`. Exits with 1 when a step failed.

    Args:
        model: Hugging Face folder, GGUF file or hub name of a chat model to make the tour on.
        train: Text of your own to calibrate and to recover that model on; the documentation on this machine without.
        val: Text to measure it on; goes with `train`.
        folder: Where everything goes; by default runs/tour, and for a model one beside it.
        short: Everything once and as small as it can be, in two minutes: whether it works, not what it gives.
        dry_run: Show the commands and run nothing.
    """
    if (train is None) != (val is None) or (train is not None and model is None):
        raise ValueError("train and val go together, and with a model")
    steps: list[Step] = []
    where = Path()
    try:
        with stop_signals_raise():
            given = None if model is None else _found(model, train, val)
            where = (folder or Path("runs") / _name(given, short)).resolve()
            steps = plan(where, given, short)
            if dry_run:
                _list(steps, where)
                return 0
            texts = [Path(text).expanduser() for text in (model, train, val) if text is not None]
            where.parent.mkdir(parents=True, exist_ok=True)
            with lock(where):
                claim(where, *(path for path in texts if path.exists()), model=given and given.name, short=short)
                ended = run(steps, where)
                _end(ended, where)
    except StopRequested as stop:
        done = sum(is_done(step, where) for step in steps)
        options = {"--model": model, "--train": train, "--val": val, "--folder": folder}
        words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        again = shlex.join(["python", "-m", "bench", "tour", *words, *(["--short"] if short else [])])
        print(f"stopped; {done} of {len(steps)} steps are done, and stay so. To go on: {again}", file=sys.stderr)
        return 128 + stop.number
    return 1 if failed(ended) else 0


def _list(steps: list[Step], folder: Path) -> None:
    for step in steps:
        print(f"{step.name}: {step.what}\n    {step.obstacle or step.command(folder)}")
    print(f"{len(steps)} steps, about {duration(sum(step.seconds for step in steps))} on two free cores")


def _found(model: str, train: Path | None, val: Path | None) -> Given:
    """A model that can be read and has a tokenizer, by a name that leads to it from any folder; texts alike.

    Raises:
        FileNotFoundError: There is no such model or text.
        ValueError: See ``loading.load_config`` and ``loading.load_tokenizer``.
    """
    from lightning_modules.loading import load_config, load_tokenizer  # takes seconds to import

    texts = {name: path and path.expanduser().resolve() for name, path in (("train", train), ("val", val))}
    for option, path in texts.items():
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: no such text: {path}")
    layers = load_config(model).get_text_config().num_hidden_layers
    load_tokenizer(model)
    here = Path(model).expanduser()
    return Given(str(here.resolve()) if here.exists() else model, layers, **texts)


def _name(given: Given | None, short: bool) -> str:
    model = [Path(given.name).name.removesuffix(".gguf")] if given else []
    parts = ["tour", *model, *(["short"] if short else [])]
    return "-".join(parts)


def _end(ended: list[Ended], folder: Path) -> None:
    """The table, what is not in it, and where the rest is."""
    table = results.table(folder / RECORDS)
    write_text(folder / TABLE, table.markdown())
    Console().print(table)
    for one in ended:
        if one.state != "done":
            print(f"{one.step.name} {one.state}: {one.why}", file=sys.stderr)
    took = sum(one.seconds for one in ended)
    done = sum(one.state == "done" for one in ended)
    print(f"{done} of {len(ended)} steps done in {duration(took)}. The same table: {folder / TABLE}")
    if ended[-1].state == "done":
        print(f"The report: {folder / 'report.html'}")
