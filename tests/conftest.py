"""Fixtures that several test folders use."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.ranks import Ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts pytest in the background lets it ignore Ctrl-C, and so would every command that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
# Files that take longest come first, so that no worker of pytest-xdist is left alone with one at the end.
LONG = (
    "tests/bench/test_fault_injection.py",
    "tests/bench/sweep/test_sweep.py",
    "tests/test_readme_runs.py",
    "tests/test_cli.py",
    "tests/test_cli_engines.py",
    "tests/bench/network",
    "tests/test_families.py",
    "tests/lightning_modules/data",
    "tests/strategies",
    "tests/callbacks",
)

# Property tests. "ci": few examples, the same on every run. "long": many, new ones on every run
# (HYPOTHESIS_PROFILE=long pytest -m hypothesis). Examples are never timed: the machine may be busy.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("long", max_examples=2000, deadline=None, database=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
        return next((number for number, name in enumerate(LONG) if path.startswith(name)), len(LONG))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Let garbage collections, of which every timing begins with one, pass over what is imported: it stays."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_seed_stays() -> Iterator[None]:
    """`seed_everything` leaves the seed in the environment, where the runs of later tests would read it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()
