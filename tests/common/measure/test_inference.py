import time

import pytest

from common.measure.inference import Work, compare_models, decode_work, prefill_work


def test_work_of_a_model_that_can_be_counted_by_hand():
    """One layer of 10 weights, a head of 6, float32, 4 cached bytes a token."""
    assert prefill_work(20, 12, 64, batch=3, tokens=5) == Work(3 * (5 * 20 + 12), 64)
    assert decode_work(32, 64, 4, batch=3, context=7) == Work(3 * 32, 64 + 3 * 7 * 4)


def test_arms_are_compared_in_turns_with_their_bounds():
    order = []
    arms = {name: lambda name=name: order.append(name) for name in ("dense", "pruned")}
    found = compare_models(arms["dense"], arms["pruned"], (Work(300, 80), Work(200, 60)), repeats=3, per=2)
    assert len(order) == 2 * (3 + 1) and order[:4] in (["dense", "pruned", "pruned", "dense"], ["dense", "pruned"] * 2)
    assert found["flop_bound"] == 1.5 and found["byte_bound"] == pytest.approx(4 / 3)
    assert found["work_dense"] == {"flops": 300, "bytes_read": 80}


def test_a_speed_up_beyond_its_bound_is_marked():
    slow, fast = lambda: time.sleep(0.02), lambda: None
    assert compare_models(slow, fast, (Work(3, 3), Work(2, 2)), repeats=3)["suspicious"]
    assert not compare_models(fast, slow, (Work(3, 3), Work(2, 2)), repeats=3)["suspicious"]
