"""What is DDP's own: buckets that stay, on gloo ranks."""

import pytest
import torch
from torch import nn

from strategies import CompressedDDP, transport
from strategies.compressors.int8 import Int8
from tests.strategies.engines import Module, fit, rows


class Spy:
    """Reduces natively and notes every call."""

    def __init__(self) -> None:
        self.calls = []

    def within(self):
        return [self]

    def warm_up(self, job, use="reduce"):
        return set()

    def all_reduce(self, grad, unit):
        self.calls.append((unit.name, grad.numel(), [p.fqn for p in unit.parameters], grad.clone()))
        transport.all_reduce_mean(grad, unit)


class Wide(Module):
    """Two layers of 1.1 MiB, so that a cap of 1 MiB makes several buckets."""

    def __init__(self) -> None:
        super().__init__(width=40_000)
        self.net.last = nn.Linear(7, 40_000)

    def training_step(self, batch, batch_idx):
        hidden = self.net.blocks(self.net.inlet(batch[0]))
        return self.net.outlet(hidden).pow(2).mean() + self.net.last(hidden).pow(2).mean()


def _buckets():
    spy, module = Spy(), Wide()
    result = fit(spy, module=module, engine="ddp", steps=3, bucket_cap_mb=1)
    return [call[:3] for call in spy.calls], result["units"]


def test_buckets_are_the_same_in_every_step(two_ranks):
    (calls, units), (others, _) = two_ranks.run(_buckets)
    assert len(units) >= 2 and calls == others
    step = len(units)
    assert [name for name, *_ in units] == [f"bucket {i}" for i in range(step)]
    assert [call[:2] for call in calls] == 3 * [(name, numel) for name, _, numel, _ in units]
    assert all(numel == valid for _, _, numel, valid in units)
    assert calls[0][2][0] == "net.last.bias"  # backward order: the last layer first


def _slices():
    """Largest difference between a bucket's slices and this rank's own gradient."""
    spy, own = Spy(), Wide()
    result = fit(spy, module=Wide(), engine="ddp", steps=1, bucket_cap_mb=1)
    own.training_step([rows(torch.distributed.get_rank())[:4]], 0).backward()
    exact = {name: p.grad for name, p in own.named_parameters()}
    wrong = 0.0
    for name, _, _, grad in spy.calls:
        for piece in result["slices"][name]:
            part = grad[piece.offset : piece.offset + piece.numel].view(piece.shape)
            wrong = max(wrong, (part - exact[piece.fqn]).abs().max().item())
    return wrong


def test_slices_say_where_every_parameter_lies(two_ranks):
    assert max(two_ranks.run(_slices)) < 1e-6


def test_nothing_but_gradients_travels(two_ranks):
    traffic = two_ranks.run(fit, Int8(), engine="ddp")[0]["traffic"]
    assert traffic.parameter_bytes() == 0
    assert {collective for _, collective in traffic.calls} == {"all_to_all", "all_gather"}


def test_a_bucket_needs_a_size():
    with pytest.raises(ValueError, match="bucket_cap_mb"):
        CompressedDDP(bucket_cap_mb=0)
