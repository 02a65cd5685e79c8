"""Budgets are met exactly, floors and caps hold, and more damage means less pruning."""

import itertools
import math

import pytest
import torch

from common.variants import variants
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.allocation.base import WeightedAllocation, prunable_parameters, water_fill
from lightning_modules.structured_pruning.allocation.curves import Curves, lower_hull
from lightning_modules.structured_pruning.allocation.global_ranking import Global
from lightning_modules.structured_pruning.allocation.inverse import Inverse
from lightning_modules.structured_pruning.allocation.inverse_ppl import InversePPL
from lightning_modules.structured_pruning.allocation.rank import Rank
from lightning_modules.structured_pruning.budget import Removal, channel_multiple, removed_parameters, whole_parts
from lightning_modules.structured_pruning.importance import LayerScores
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.model_shape import ModelShape, parameters_of
from lightning_modules.structured_pruning.search import largest_share
from tests.lightning_modules.structured_pruning.toy import plan_for, tiny

LAYER = LayerShape(8, 4, 64, 1024, 10_000, 300, 8 * 10_000 + 1024 * 300 + 512)
SHAPES = [LAYER] * 6
DAMAGE = LayerDamage(3.0, [9.0, 3.5, 3.1, 3.05, 2.99, 4.0])
WHOLE = sum(map(prunable_parameters, SHAPES))


def _scores(seed: int = 0) -> list[LayerScores]:
    generator = torch.Generator().manual_seed(seed)
    return [LayerScores(torch.rand(8, generator=generator) * 30, torch.rand(1024, generator=generator)) for _ in SHAPES]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.69])
@pytest.mark.parametrize("allocation", variants(Allocation), ids=lambda cls: cls.__name__)
def test_every_allocation_meets_the_target_within_its_cap(allocation, share):
    method = allocation(cap=0.7)
    target = round(share * WHOLE)
    removals = method.removals(SHAPES, target, DAMAGE, _scores())
    removed = [r.groups * LAYER.group_parameters + r.channels * LAYER.channel_parameters for r in removals]
    assert abs(sum(removed) - target) <= (1 if isinstance(method, WeightedAllocation) else LAYER.group_parameters)
    assert all(r.groups <= 0.7 * 8 + 0.5 and r.channels <= 0.7 * 1024 + 0.5 for r in removals)
    assert all(r.groups >= 0 and r.channels >= 0 for r in removals)


@pytest.mark.parametrize("allocation", [Inverse, InversePPL, Rank])
def test_more_damage_means_less_pruning(allocation):
    removals = allocation().removals(SHAPES, WHOLE // 4, DAMAGE, None)
    order = sorted(range(6), key=lambda i: DAMAGE.without[i])
    rates = [removals[i].groups for i in order]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_curves_divide_so_that_the_sum_of_rises_is_least():
    """Against all divisions in steps of a twentieth."""
    shapes, rates = SHAPES[:3], (0.25, 0.5)
    partly = [[(0.25, 3.2), (0.5, 3.6)], [(0.25, 3.01), (0.5, 4.0)], [(0.25, 3.5), (0.5, 3.55)]]
    damage = LayerDamage(3.0, [9.0, 9.0, 4.0], partly)
    method = Curves(cap=0.75, rates=rates)
    curves = [
        dict(lower_hull([(0.0, 3.0), *some, (1.0, last)])) for some, last in zip(partly, damage.without, strict=True)
    ]

    def rise(index: int, rate: float) -> float:
        xs = sorted(curves[index])
        end = next(x for x in xs if x >= rate)
        start = xs[max(xs.index(end) - 1, 0)]
        low, high = curves[index][start], curves[index][end]
        return low + (high - low) * (rate - start) / (end - start or 1)

    for twentieths in (6, 15, 30):
        found = [r.channels / LAYER.channels for r in method.removals(shapes, twentieths * WHOLE // 120, damage, None)]
        every = itertools.product(range(16), repeat=3)
        best = min(sum(rise(i, k / 20) for i, k in enumerate(ks)) for ks in every if sum(ks) == twentieths)
        assert sum(found) == pytest.approx(twentieths / 20) and max(found) <= 0.75 + 1e-9
        assert sum(rise(i, rate) for i, rate in enumerate(found)) == pytest.approx(best)
    assert lower_hull([(0.0, 3.0), (0.0, 2.0), (1.0, 4.0)]) == [(0.0, 2.0), (1.0, 4.0)]
    for wrong in ((), (0.5, 0.25), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="rates must rise between 0 and 1"):
            Curves(rates=wrong)


def test_weights_are_what_they_say():
    damage = LayerDamage(2.0, [3.0, 2.5, 4.0])
    assert Inverse().weights(damage) == [1.0, 2.0, 0.5]
    assert InversePPL().weights(damage) == pytest.approx([math.exp(-1), math.exp(-0.5), math.exp(-2)])
    assert Rank().weights(damage) == [2.0, 3.0, 1.0]


def test_water_filling_clips_and_makes_up_for_it_elsewhere():
    rates = water_fill([100.0, 2.0, 1.0, 0.0], [10, 10, 10, 10], 12.0, 0.1, 0.5)
    assert rates == pytest.approx([0.5, 0.4, 0.2, 0.1])


def test_floor_and_cap_say_the_nearest_budget():
    with pytest.raises(ValueError, match=r"allocation.cap 0.3; the nearest possible is .* \(29\.96%\)"):
        Inverse(cap=0.3).removals(SHAPES, WHOLE // 2, DAMAGE, None)
    with pytest.raises(ValueError, match=r"allocation.floor 0.2; the nearest"):
        Inverse(floor=0.2).removals(SHAPES, WHOLE // 10, DAMAGE, None)
    with pytest.raises(ValueError, match=r"floor 0\.5, cap 0\.2"):
        Inverse(floor=0.5, cap=0.2)


def test_the_global_ranking_takes_the_cheapest_parts_first():
    shapes = [LayerShape(2, 1, 1, 3, 100, 10, 230)] * 2
    scores = [
        LayerScores(torch.tensor([1.0, 50.0]), torch.tensor([5.0, 0.2, 9.0])),
        LayerScores(torch.tensor([90.0, 80.0]), torch.tensor([0.3, 0.4, 7.0])),
    ]
    # per parameter: group 0 of layer 0 costs 0.01, channels 0.02, 0.03 and 0.04, and all else 0.5 and more
    assert Global(cap=1.0).removals(shapes, 130, None, scores) == [Removal(1, 1), Removal(0, 2)]
    assert Global(cap=1.0).removals(shapes, 110, None, scores) == [Removal(1, 1), Removal(0, 0)]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.6])
def test_whole_parts_come_as_near_as_their_sizes_allow(share):
    """Within 0.12 % of the decoder, also for 4 groups of 81,920 parameters and steps of 64 channels of 768."""
    for layer in (LAYER, LayerShape(4, 4, 32, 704, 81_920, 768, 868_864)):
        shapes = [layer] * 8
        target = round(share * sum(s.parameters for s in shapes))
        damage = LayerDamage(3.0, [9.0, 3.5, 3.1, 3.05, 2.99, 4.0, 3.3, 3.2])
        keep = whole_parts(shapes, Inverse(cap=0.8).removals(shapes, target, damage, None), target, 64)
        removed = sum(s.parameters - parameters_of(s, k.groups, k.channels) for s, k in zip(shapes, keep, strict=True))
        assert abs(removed - target) <= 0.0012 * sum(s.parameters for s in shapes)
        assert all(k.channels % 64 == 0 and k.groups >= 1 for k in keep)


def test_what_no_whole_parts_can_remove_is_refused():
    with pytest.raises(ValueError, match="every layer keeps a group and 64 channels, so at most"):
        whole_parts(SHAPES, [Removal(8, 1024)] * 6, WHOLE, 64)


def test_channels_keep_a_multiple_that_divides_them():
    def shape(channels: int) -> LayerShape:
        return LayerShape(4, 1, 8, channels, 1, 1, 1)

    assert channel_multiple([shape(14336)], None) == 64
    assert channel_multiple([shape(704)], None) == 64
    assert channel_multiple([shape(96)], None) == 8  # 12 widths to choose from
    assert channel_multiple([shape(512), shape(448 + 8)], None) == 8
    assert channel_multiple([shape(704)], 16) == 16
    with pytest.raises(ValueError, match="channel_multiple"):
        channel_multiple([shape(96)], 128)


def test_footprints_are_those_of_the_sliced_model():
    from lightning_modules.structured_pruning.slicing import slice_model

    for tied in (True, False):
        dense = tiny(tie_word_embeddings=tied)
        plan = plan_for(dense)
        sliced = slice_model(dense, plan)
        after = ModelShape.of(dense, 4).footprint(16, plan.layers)
        assert after.parameters == sliced.num_parameters() and after.weight_bytes == 4 * after.parameters
        assert after == ModelShape.of(sliced, 4).footprint(16)
        cache = sliced(torch.arange(5)[None], use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert after.kv_bytes_per_token == held / 5


def test_budgets_in_parameters_and_bytes():
    dense = ModelShape.of(tiny(), 4).footprint(16)
    assert removed_parameters(0.25, "decoder", dense) == round(0.25 * dense.decoder_parameters)
    assert removed_parameters(dense.parameters - 1000, "parameters", dense) == 1000
    assert removed_parameters(dense.weight_bytes - 4000, "bytes", dense) == 1000
    for amount, unit in ((1.5, "decoder"), (0, "decoder"), (10, "parameters"), (1e9, "parameters"), (1, "bytes")):
        with pytest.raises(ValueError, match=r"budget: .*(between|cannot)"):
            removed_parameters(amount, unit, dense)


def test_the_largest_share_under_a_limit():
    shares = [0.05, 0.1, 0.25, 0.3, 0.5]
    for limit, expected in ((20, 0.1), (19, 0.05), (39, 0.25), (59, 0.3), (60, 0.5)):
        assert largest_share(lambda share: 10 + 100 * share, limit, shares) == expected
    with pytest.raises(ValueError, match=r"no share down to 5\.00% .* raise the limit"):
        largest_share(lambda share: 30.0, 20, shares)
