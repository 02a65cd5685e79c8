"""English text from Python source files: docstrings, found by parsing, never by importing.

Also a small program (``python docstrings.py SHARD SHARDS FOLDER...``) that needs only the standard library, so that
several of them can parse at once: each prints one JSON list of docstrings for every file of its shard.
"""

import ast
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def source_files(folders: Sequence[Path]) -> list[Path]:
    """All Python files below the folders but tests, in a fixed order."""
    return [
        file
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(file.relative_to(folder).parts)
    ]


def docstrings_of(source: bytes) -> list[str]:
    """Cleaned docstrings of a module and of its classes and functions, outermost first; none if it is not Python."""
    found = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's source are not our business
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, found)]
    except (SyntaxError, ValueError):
        return []
    return [text for node in nodes if (text := ast.get_docstring(node))]


def topics_of(source: bytes) -> list[str]:
    """The texts in a module that assigns one dictionary of strings, such as ``pydoc_data.topics``."""
    return [
        inspect.cleandoc(value.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for value in node.value.values
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]


def parse_folders(folders: Sequence[Path], processes: int) -> Iterator[list[str]]:
    """The docstrings of each file of ``source_files(folders)``, in that order, parsed by several processes.

    A plain child process rather than ``multiprocessing``: it neither forks a process that has threads nor imports the
    main program again, and it ends by itself (closed pipe) when this process is killed.
    """
    command = [sys.executable, "-I", __file__]
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                Popen([*command, str(k), str(processes), *map(str, folders)], stdout=PIPE, stderr=DEVNULL)
            )
            for k in range(processes)
        ]
        # Runs before the children are waited for, so that a reader that stops early does not wait for the whole parse.
        for child in children:
            stack.callback(child.kill)
        outputs = [child.stdout for child in children if child.stdout]
        for k, _ in enumerate(source_files(folders)):
            line = outputs[k % processes].readline()
            if not line:
                raise RuntimeError(f"parsing {', '.join(map(str, folders))} ended early at file {k}")
            yield json.loads(line)


def _main(shard: int, shards: int, folders: Sequence[Path]) -> None:
    for file in source_files(folders)[shard::shards]:
        # "replace": a lone surrogate written as an escape cannot be UTF-8.
        texts = [text.encode("utf-8", "replace").decode() for text in docstrings_of(file.read_bytes())]
        print(json.dumps(texts), flush=True)


if __name__ == "__main__":
    try:
        _main(int(sys.argv[1]), int(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
    except BrokenPipeError:
        sys.stderr.close()  # the reader is gone: nothing to tell, nobody to tell it to
