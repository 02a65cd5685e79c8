"""1-bit Adam: AdamW until its variance is frozen, then momenta, against the same in one process."""

import pytest
import torch

from strategies.compressors.bidirectional import Bidirectional
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.compressors.none_a2a import NoCompressionA2A
from strategies.compressors.onebit import OneBit
from strategies.compressors.onebit_adam import OneBitAdam
from strategies.compressors.warmup import WarmUp
from tests.strategies.engines import ENGINES, Module, fit, rows

by_engine = pytest.mark.parametrize("engine", ENGINES)
WARM, STEPS = 3, 7


class Adam(Module):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, eps=1e-3, weight_decay=0.1)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 10), "interval": "step"}
        ]


def adam(*args, **options):
    return fit(*args, module=Adam(), **options)


def _by_hand(n, frozen):
    """The same training in one process, the variance of step ``WARM`` in every later one if ``frozen``."""
    module = Adam()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in module.named_parameters()}
    for step in range(1, STEPS + 1):
        rate = 1e-2 * (1 - 0.9 * (step - 1) / 10)
        module.zero_grad()
        sum(module.net(rows(rank)[:4]).pow(2).mean() for rank in range(n)).div(n).backward()
        for name, p in module.named_parameters():
            first, second = moments[name]
            first.mul_(0.9).add_(p.grad, alpha=0.1)
            at = min(step, WARM) if frozen else step
            if at == step:
                second.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            spread = (second / (1 - 0.999**at)).sqrt() + 1e-3
            with torch.no_grad():
                p.mul_(1 - rate * 0.1).sub_(rate * first / (1 - 0.9**step) / spread)
    return {name.removeprefix("net."): p.detach() for name, p in module.named_parameters()}


def _distance(one, other):
    return torch.cat([(one[name] - other[name]).flatten() for name in other]).norm().item()


@by_engine
def test_with_exact_momenta_it_is_adam_with_a_frozen_variance(engine, two_ranks):
    method = OneBitAdam(NoCompressionA2A(), warmup_steps=WARM)
    weights = two_ranks.run(adam, method, engine=engine, steps=STEPS)[0]["weights"]
    wanted, thawed = _by_hand(2, frozen=True), _by_hand(2, frozen=False)
    assert _distance(weights, wanted) < 1e-5 < 1e-3 < _distance(weights, thawed)


@by_engine
def test_one_bit_momenta_stay_near(engine, two_ranks):
    exact, coded = (
        two_ranks.run(adam, OneBitAdam(inner, warmup_steps=WARM), engine=engine, steps=STEPS)
        for inner in (NoCompressionA2A(), None)
    )
    start = dict(Module().net.named_parameters())
    moved = _distance(exact[0]["weights"], {name: p.detach() for name, p in start.items()})
    assert 0 < _distance(coded[0]["weights"], exact[0]["weights"]) < 0.5 * moved
    for name, weight in coded[0]["weights"].items():
        assert torch.equal(weight, coded[1]["weights"][name])


@pytest.mark.parametrize("step", [2, 5])
@by_engine
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(engine, step, two_ranks, tmp_path):
    path, method = str(tmp_path / "last.ckpt"), OneBitAdam(warmup_steps=WARM)
    if engine == "ddp":
        method = OneBitAdam(Bidirectional(ErrorFeedback(OneBit())), WARM)
    whole = two_ranks.run(adam, method, engine=engine, steps=STEPS)
    two_ranks.run(adam, method, engine=engine, steps=step, folder=path)
    for rank, resumed in enumerate(two_ranks.run(adam, method, engine=engine, steps=STEPS, ckpt_path=path)):
        assert resumed["losses"] == whole[rank]["losses"][step:]
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(weight, resumed["weights"][name])
        for unit, state in whole[rank]["state"].items():
            assert all(torch.equal(part, resumed["state"][unit][name]) for name, part in state.items())


def _refusal(method, module=Adam, **options):
    try:
        fit(method, module=module(), **options)
    except ValueError as refusal:
        return str(refusal)
    return "accepted"


@pytest.mark.parametrize(
    ("method", "module", "named"),
    [
        (OneBitAdam(), Module, "SGD"),
        (OneBitAdam(beta1=0.8), Adam, "beta1=0.8"),
        (WarmUp(OneBitAdam()), Adam, "compressor itself"),
    ],
    ids=["sgd", "beta1", "inside"],
)
def test_what_cannot_be_frozen_is_refused_by_name(method, module, named, two_ranks):
    for message in two_ranks.run(_refusal, method, module, engine="ddp"):
        assert named in message


def test_between_replicas_it_is_refused(two_ranks):
    options = {"engine": "ddp", "replicas": 2, "replica_compressor": OneBitAdam()}
    for message in two_ranks.run(_refusal, Int8(), **options):
        assert "compressor itself" in message


@pytest.mark.parametrize("options", [{"warmup_steps": 0}, {"beta1": 1.0}])
def test_arguments_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OneBitAdam(**options)
