"""Reductions that run while backward goes on, on gloo ranks."""

import threading

import pytest
import torch
from torch import nn

from strategies.compressors import Int8
from strategies.ddp_buckets import FixedBuckets, bucket_units, install_hook
from strategies.traffic import Traffic
from tests.strategies.engines import fit

_WAIT_S = 60  # for something that happens at once, or never


def _waits(overlap):
    """Whether the first layer's gradient is there before the last layer's reduction has ended."""
    model = nn.Sequential(*[nn.Linear(600, 600, bias=False) for _ in range(3)])
    wrapped = FixedBuckets(model, None, 1)  # a bucket each
    units, reached, seen = bucket_units(wrapped, Traffic()), threading.Event(), []
    model[0].weight.register_hook(lambda grad: reached.set())

    def reduce(unit, grad):
        if not seen:
            seen.append(reached.wait(_WAIT_S if overlap else 0.1))
        torch.distributed.all_reduce(grad)

    install_hook(wrapped, units, reduce, overlap)
    wrapped(torch.ones(1, 600)).sum().backward()
    return len(units), seen[0]


def test_backward_goes_on_while_a_bucket_is_reduced(two_ranks):
    assert two_ranks.run(_waits, True) == [(3, True)] * 2
    assert two_ranks.run(_waits, False) == [(3, False)] * 2


def test_results_are_the_same(two_ranks):
    aside, here = (two_ranks.run(fit, Int8(16), engine="ddp", overlap=overlap)[0] for overlap in (True, False))
    assert aside["losses"] == here["losses"] and aside["traffic"].sent == here["traffic"].sent


def _broken():
    class Broken(Int8):
        def encode(self, *args, **kwargs):
            raise KeyError("scales")

    with pytest.raises(KeyError, match=r"^'scales'$") as raised:
        fit(Broken(), engine="ddp")
    return [entry.name for entry in raised.traceback][-1]


def test_an_error_of_the_thread_is_raised_as_what_it_is(two_ranks):
    assert two_ranks.run(_broken) == ["encode"] * 2
