"""The bound on speed-ups, against published shapes and counted operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bench.experiments.prefill_claims import QWEN2_7B
from lightning_modules.token_pruning.anatomy import SUPPORTED
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.schedule import Schedule, preset
from lightning_modules.token_pruning.scorers.learned import Learned
from lightning_modules.token_pruning.scorers.recency import Recency
from tests.lightning_modules.token_pruning.models import build, tokens


@pytest.fixture(scope="module")
def qwen2_7b():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(QWEN2_7B)


def test_operations_of_a_known_model(qwen2_7b):
    cost = Cost.of(qwen2_7b)
    assert sum(cost.linear) == pytest.approx(13.05e9, rel=1e-3)  # per token
    assert cost.head == 2 * 3584 * 152064 and set(cost.attention) == {4.0 * 3584}


@pytest.mark.parametrize(
    ("name", "at_4k", "at_32k"), [("keep09", 1.42, 1.52), ("keep08", 1.92, 2.11), ("keep07", 2.46, 2.71)]
)
def test_bounds_of_the_published_schedule(qwen2_7b, name, at_4k, at_32k):
    keep = preset(name).keep
    schedule = Schedule(
        keep=keep, of="prompt", tail=0.0
    )  # published without the floor that the tail sets to deep stages
    scorer = Learned(TokenPruner(3584, schedule.resolve(28), network=MLP(1024)))
    cost = Cost.of(qwen2_7b)
    assert cost.bound(4096, schedule, scorer) == pytest.approx(at_4k, abs=0.011)
    assert cost.bound(32768, schedule, scorer) == pytest.approx(at_32k, abs=0.011)
    assert cost.bound(4096, schedule) > cost.bound(4096, schedule, scorer)


def test_no_schedule_beats_the_layers_that_always_run(qwen2_7b):
    nothing_left = Schedule(layers=[4], tokens=1, sinks=0, tail=0.0, min_tail=1)
    assert 5.5 < Cost.of(qwen2_7b).bound(131072, nothing_left) < 28 / 5


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_operations_are_those_that_run(family):
    model, ids = build(family, "eager"), tokens(1, 96)
    if family in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # what others run, the counter does not see
    schedule = Schedule(layers=[1, 3], keep=0.5)
    cost = Cost.of(model)
    for lengths, pruner in (([96] * 6, None), (schedule.lengths(96, 6), PromptPruner(Recency(), schedule))):
        with FlopCounterMode(display=False) as counter:
            if pruner is None:
                model(ids, logits_to_keep=1)
            else:
                with pruner.prefill(model):
                    model(ids, logits_to_keep=1)
        # eager attention computes the whole square, of which causal attention needs half
        square = sum(a * n * n / 2 for a, n in zip(cost.attention, lengths, strict=True))
        assert counter.get_total_flops() == pytest.approx(cost.prefill(lengths) + square, rel=0.01)


def test_the_bound_of_keeping_all_is_1():
    assert Cost.of(build(layers=4)).bound(100, Schedule(layers=[1], keep=1.0)) == 1.0
