"""Interval sets as arrays [n, 2] of start and end, sorted and disjoint; all operations are one sort and one scan."""

from collections.abc import Iterable

import numpy as np


def union(intervals: Iterable[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """Sorted disjoint cover of arbitrary intervals.

    Args:
        intervals: Pairs (start, end) in any order, possibly overlapping; those with end <= start are dropped.

    Returns:
        float64 [m, 2].
    """
    array = np.asarray(intervals if isinstance(intervals, np.ndarray) else list(intervals), dtype=np.float64)
    array = array.reshape(-1, 2)
    array = array[array[:, 1] > array[:, 0]]
    if not len(array):
        return array
    array = array[np.argsort(array[:, 0], kind="stable")]
    reach = np.maximum.accumulate(array[:, 1])
    first = np.concatenate([[True], array[1:, 0] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([array[first, 0], reach[last]], axis=1)


def length(cover: np.ndarray) -> float:
    """Total length of a disjoint cover."""
    return float((cover[:, 1] - cover[:, 0]).sum())


def clip(cover: np.ndarray, start: float, end: float) -> np.ndarray:
    """The part of a cover inside [start, end]."""
    return union(np.clip(cover, start, end))


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What two covers share."""
    return _where_level(a, b, weight_b=1, level=2)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What cover `a` has and cover `b` has not."""
    # Inside a alone the running sum is 1; inside b it is -2, inside both -1.
    return _where_level(a, b, weight_b=-2, level=1)


def contains(cover: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Whether each time (float [n]) lies in a cover; bool [n]."""
    index = np.searchsorted(cover[:, 0], times, side="right") - 1
    inside = np.zeros(len(times), dtype=bool)
    valid = index >= 0
    inside[valid] = times[valid] < cover[index[valid], 1]
    return inside


def _where_level(a: np.ndarray, b: np.ndarray, weight_b: int, level: int) -> np.ndarray:
    """Stretches where the weighted number of open intervals equals `level`."""
    times = np.concatenate([a[:, 0], a[:, 1], b[:, 0], b[:, 1]])
    steps = np.repeat([1, -1, weight_b, -weight_b], [len(a), len(a), len(b), len(b)])
    order = np.argsort(times, kind="stable")
    times, running = times[order], np.cumsum(steps[order])
    hit = np.flatnonzero(running[:-1] == level)
    return union(np.stack([times[hit], times[hit + 1]], axis=1))
