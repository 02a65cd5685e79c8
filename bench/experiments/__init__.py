"""Experiments: one figure (or a few that need the same runs), one file, one command.

`python -m bench experiment NAME` runs it and appends its figures to a records' file. An experiment runs `main.py` as a
user would and reads the records and logs it leaves, or measures parts of a feature in a process of its own
(`runs.json_lines`).
"""

import pkgutil


def names() -> list[str]:
    """Every experiment there is."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "runs")
