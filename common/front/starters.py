"""`init`: a starter configuration for one's own model, made from those in configs/starter, one file a task."""

import json
import re
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

TEMPLATES = Path(__file__).parents[2] / "configs/starter"
# What a template names, and init replaces.
MODEL, OUTPUT, HERE = "HuggingFaceTB/SmolLM2-135M-Instruct", "runs/starter", "configs/starter"
_PLAIN = re.compile(r"[\w./~-]+")  # needs no quotes in YAML or a shell


class RefusedError(ValueError):
    """What was asked for cannot be written; the message names it and the fix."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedError(message)


def tasks() -> dict[str, str]:
    """What each task is for, by name."""
    return {path.stem: _lines(path.read_text("utf-8"))[0] for path in sorted(TEMPLATES.glob("*.yaml"))}


def command(arguments: list[str]) -> list[str]:
    """Write a configuration, asking for what is not given, and say what comes next.

    Args:
        arguments: What follows `init`.

    Returns:
        The arguments that check the configuration.

    Raises:
        RefusedError: It cannot be written.
        OSError: The same, by the system.
    """
    parser = _Parser(prog="main.py init", add_help=False)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--task")
    parser.add_argument("--model")
    given = parser.parse_args(arguments)
    if given.folder is None:
        raise RefusedError("give a new folder for the configuration: init FOLDER")
    task = given.task or _ask("task", "\n".join(f"  {name}: {does}" for name, does in tasks().items()))
    _check_task(task)
    _check_free(Path(given.folder), task)
    model = given.model or _ask("model", "  a Hugging Face folder, a hub name or a GGUF file")
    path = write(Path(given.folder), task, model)
    run, *then = next_commands(path.read_text("utf-8"))
    print(f"{path} written. Next:", *(f"  {line}" for line in (run, *then)), sep="\n", flush=True)
    return ["check", "--command", shlex.split(run)[2], "--config", str(path)]


def write(folder: Path, task: str, model: str) -> Path:
    """Write ``folder/task.yaml`` for a model; results of its commands go to the same folder.

    Args:
        folder: Made when missing.
        task: One of ``tasks()``.
        model: Hugging Face folder, hub name or GGUF file.

    Returns:
        The file.

    Raises:
        RefusedError: There is no such task or model, or the file is there already.
    """
    _check_task(task)
    _check_free(folder, task)
    _check_model(model)
    text = (TEMPLATES / f"{task}.yaml").read_text("utf-8")
    lines = []
    for line in text.splitlines():
        quote = shlex.quote if line.startswith("#") else _quoted
        # within a mapping on one line a value may be a part of a path: the folder then has to be plain
        for old, new in ((MODEL, quote(model)), (HERE, str(folder)), (OUTPUT, str(folder))):
            line = line.replace(old, new)
        lines.append(line)
    path = folder / f"{task}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "x", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def next_commands(text: str) -> list[str]:
    """The command lines that a configuration's header names: what runs it, and what comes then."""
    return re.findall(r"^# (?:run|then): (.+)$", text, re.M)


def _check_task(task: str) -> None:
    if not tasks():
        raise RefusedError(f"no templates in {TEMPLATES}: install Pare from its repository, pip install -e .")
    if task not in tasks():
        raise RefusedError(f"--task: there is no {task!r}; there are: {', '.join(tasks())}")


def _check_free(folder: Path, task: str) -> None:
    path = folder / f"{task}.yaml"
    if path.exists():
        raise RefusedError(f"{path} is there already, and stays as it is: give another folder")
    if not _PLAIN.fullmatch(str(folder)):
        raise RefusedError(f"{folder}: give a folder of letters, digits and ./~-_ only")


def _check_model(model: str) -> None:
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise RefusedError(f"--model: {model} has no config.json: it is no Hugging Face folder")
    local = model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1
    if not path.exists() and local:
        raise RefusedError(f"--model: there is no {model}")
    if path.is_file() and path.suffix != ".gguf":
        raise RefusedError(f"--model: {model} is neither a folder nor a GGUF file")


def _ask(name: str, choices: str) -> str:
    if not sys.stdin.isatty():
        raise RefusedError(f"give --{name}:\n{choices}")
    print(choices, file=sys.stderr)
    try:
        answer = input(f"{name}? ").strip()
    except EOFError:
        answer = ""
    if not answer:
        raise RefusedError(f"no {name} was given")
    return answer


def _quoted(text: str) -> str:
    """A scalar of YAML."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _lines(text: str) -> list[str]:
    return [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
