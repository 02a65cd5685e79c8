import gc
from contextlib import nullcontext

import pytest
import torch

from common.measure.timing import interleaved, percentiles, queued, ratio_with_spread


def test_percentiles_without_the_warm_up():
    summary = percentiles([1000.0, 500.0, *range(1, 102)], warmup=2)
    assert summary == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p95": 96.0, "iqr": 50.0, "n": 101}
    with pytest.raises(ValueError, match="2 measured, 2 of them warm-up"):
        percentiles([1.0, 2.0], warmup=2)


def test_arms_take_turns_and_each_goes_first():
    calls, collecting = [], []

    def arm(name):
        collecting.append(gc.isenabled())
        calls.append(name)

    times = interleaved({n: lambda n=n: arm(n) for n in "abc"}, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value > 0 for values in times.values() for value in values)
    assert not any(collecting) and gc.isenabled()


def test_arms_are_timed_by_the_clock_that_is_given():
    times = interleaved({"a": lambda: 3.0, "b": lambda: 4.0}, repeats=2, clock=lambda call: 2 * call())
    assert times == {"a": [6.0, 6.0], "b": [8.0, 8.0]}


class _Gpu:
    """A GPU that takes 2 ms for a call, and Python 50 ms to launch it: what waits in its queue costs nothing more."""

    def __init__(self):
        self.busy_until, self.now, self.pause_ms = 0.0, 0.0, 1000.0

    def work(self, ms):
        self.now += 50.0
        self.busy_until = max(self.busy_until, self.now) + ms

    def event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.busy_until, gpu.now)

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def test_a_call_on_a_gpu_is_timed_without_pythons_part(monkeypatch):
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.work(gpu.pause_ms))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert queued(lambda: gpu.work(2.0), torch.device("cuda"), 4) == pytest.approx(2.0)


def test_a_failing_arm_raises_and_restores_the_collector():
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, repeats=1)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved({}, repeats=1)


def test_the_ratio_is_taken_within_rounds():
    # The machine slows down fivefold half-way; within each round the candidate is twice as fast.
    baseline = [10.0, 10.0, 50.0, 50.0, 50.0]
    candidate = [5.0, 5.0, 25.0, 25.0, 25.0]
    assert ratio_with_spread(baseline, candidate) == {"ratio": 2.0, "p25": 2.0, "p75": 2.0, "spread": 0.0, "n": 5}
    summary = ratio_with_spread([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert summary == {"ratio": 3.0, "p25": 2.0, "p75": 4.0, "spread": 1.0, "n": 5}


@pytest.mark.parametrize(("baseline", "candidate"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0])])
def test_no_ratio_of_what_was_not_measured_together(baseline, candidate):
    with pytest.raises(ValueError):
        ratio_with_spread(baseline, candidate)
