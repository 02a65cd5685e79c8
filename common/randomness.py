"""Seeds as pure functions of (seed, step, rank), so that a resumed run needs no saved generator state."""

import os

import numpy as np


def run_seed() -> int:
    """The seed of this run.

    Returns:
        What ``seed_everything`` was called with (it leaves ``PL_GLOBAL_SEED`` for all ranks), 0 if it was not called.
    """
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one rank, statistically independent of every other step, rank and run seed.

    Args:
        seed: The seed of the run, not negative.
        step: Batches (or steps) done before this one, not negative.
        rank: Global rank, not negative.

    Returns:
        A whole number in [0, 2**63), which ``torch.manual_seed`` and ``numpy`` both accept.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
