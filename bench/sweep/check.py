"""Try the arguments of many runs in one process, so that a sweep refuses what cannot run before its first run.

`python -m bench.sweep.check` reads a JSON list of argument lists of `main.py fit` and writes a JSON list of, for each,
null or the error. Everything but the callbacks is built (a callback may want a network interface that exists only on an
emulated host); nothing runs.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def problems(arguments: Sequence[Sequence[str]]) -> list[str | None]:
    """For each argument list of `main.py fit` what is wrong with it, or None. Takes seconds, then 0.4 s a list.

    Raises:
        RuntimeError: Pare itself does not start.
    """
    if not arguments:
        return []
    done = subprocess.run(
        [sys.executable, "-m", "bench.sweep.check"],
        input=json.dumps([list(one) for one in arguments]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CI": "true", "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(f"main.py does not start: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _explain(text: str) -> str:
    """What is wrong, out of jsonargparse's message: without the usage, and without the values and types it tried."""
    message = text[text.rfind("error:") + len("error:") :] if "error:" in text else text
    noise = re.compile(r"\s*(Given value|Subtypes:|Errors:|- Expected a <class|(- |ValueError: )?Does not validate)")
    lines = [line.strip() for line in message.strip().splitlines() if not noise.match(line)]
    return " ".join(lines)[:1000]


def _check_all(runs: Sequence[Sequence[str]]) -> list[str | None]:
    import main

    class Check(main.PareCLI):
        """Builds everything but the callbacks, and stops there."""

        def instantiate_classes(self) -> None:
            self.config.fit.trainer.callbacks = None
            super().instantiate_classes()

        def _run_subcommand(self, subcommand: str) -> None:
            ranks = self.trainer.num_nodes * self.trainer.num_devices
            replicas = getattr(self.trainer.strategy, "replicas", 1)
            if ranks % replicas:
                raise ValueError(f"replicas={replicas} does not divide {ranks} ranks")

    def check(arguments: Sequence[str]) -> str | None:
        sys.argv = ["main.py", "fit", *arguments]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main.main()
        except SystemExit as end:
            return _explain(said.getvalue()) if end.code else None
        except Exception as error:  # whatever a constructor raises is the answer
            return _explain(f"{type(error).__name__}: {error}")
        return None

    main.PareCLI = Check  # type: ignore[misc]
    return [check(arguments) for arguments in runs]


if __name__ == "__main__":
    print(json.dumps(_check_all(json.load(sys.stdin))))
