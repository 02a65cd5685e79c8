"""Rounds: plans composed in the first model's numbers, recoveries that can be gone through again, damage noticed."""

import copy
import json

import pytest
import torch

from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.rounds import (
    Round,
    composed,
    load_rounds,
    recovered,
    save_rounds,
    short_recovery,
)
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.structured_pruning.toy import DROPPED, KEPT, batches, plan_for, tiny, two_samples


def _second(kept: list[LayerPlan]) -> list[LayerPlan]:
    """Of every layer that is left, all but the first group, and every second channel from the second on."""
    left = [layer for layer in kept if not layer.dropped]
    return [
        LayerPlan(list(range(len(layer.groups) > 1, len(layer.groups))), list(range(1, len(layer.channels), 2)))
        for layer in left
    ]


@pytest.mark.parametrize("kept", [KEPT, DROPPED], ids=["parts", "a whole layer"])
def test_slicing_twice_is_slicing_once_by_the_composed_plan(kept):
    dense = tiny("qwen2")
    first = plan_for(dense, kept)
    once = slice_model(dense, first)
    second = plan_for(once, _second(kept))
    whole = composed([first, second])
    assert whole.shapes == first.shapes and whole.base_hash == first.base_hash
    second.settings["notes"] = ["of 3 groups 2 are kept"]
    assert composed([second]).settings == second.settings
    assert composed([first, second]).settings == {"notes": [], "round": 2}, "what was cut then is not the first model"
    assert model_hash(slice_model(dense, whole)) == model_hash(slice_model(once, second))
    third = plan_for(slice_model(once, second), _second(second.layers))
    assert composed([first, second, third]).layers == composed([whole, third]).layers
    with pytest.raises(ValueError, match="not for the model that the round before leaves"):
        composed([first, first])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recovery_learns_and_can_be_gone_through_again_bit_for_bit(dtype):
    model = slice_model(tiny(dtype=dtype), plan_for(tiny(dtype=dtype)))
    before = copy.deepcopy(model)
    told = []
    after, adapters = short_recovery(model, batches(2), 3, learning_rate=1e-2, done=told.append)
    assert told == [1, 2, 3] and not after.training and all(p.requires_grad for p in after.parameters())
    assert model_hash(after) != model_hash(before)
    assert model_hash(recovered(before, adapters)) == model_hash(after)


def test_what_is_merged_is_alpha_over_rank_times_the_product():
    """The seventh projection of a layer, by hand: W + (alpha / rank) · B · A, with alpha twice the rank."""
    model = slice_model(tiny(), plan_for(tiny()))
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    after, adapters = short_recovery(model, batches(2), 3, learning_rate=1e-2)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    product = adapters[name.format("B")] @ adapters[name.format("A")]
    assert product.abs().max() > 1e-3
    torch.testing.assert_close(after.model.layers[1].mlp.down_proj.weight, weight + 2 * product, atol=1e-6, rtol=1e-5)


def test_rounds_are_saved_and_read_and_damage_is_named(tmp_path):
    dense = tiny()
    first = plan_for(dense)
    once, adapters = short_recovery(slice_model(dense, first), batches(1), 1, learning_rate=1e-2)
    second = plan_for(once, _second(KEPT))
    whole = composed([first, second])
    save_rounds(tmp_path, [Round(first, adapters), Round(second, None)])
    again = load_rounds(tmp_path, whole)
    assert [one.plan for one in again] == [first, second] and again[1].adapters is None
    assert all(torch.equal(again[0].adapters[name], weight) for name, weight in adapters.items())
    save_rounds(tmp_path / "single", [Round(first, None)])
    assert not (tmp_path / "single").exists()
    assert load_rounds(tmp_path / "single", first) == [Round(first, None)]

    with pytest.raises(ValueError, match="the rounds together do not keep what the plan of"):
        load_rounds(tmp_path, first)
    weights = tmp_path / "rounds/1.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"rounds/1\.safetensors is damaged"):
        load_rounds(tmp_path, whole)
    weights.unlink()
    with pytest.raises(ValueError, match="every round but the last has adapters"):
        load_rounds(tmp_path, whole)
    path = tmp_path / "rounds/2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": []}))
    with pytest.raises(ValueError, match=r"rounds/2\.json is not a pruning plan"):
        load_rounds(tmp_path, whole)


def test_recovery_leaves_padding_and_neighbours_out():
    """Packed or padded, the same two samples teach the adapters the same."""
    found = []
    for batch in two_samples().values():
        torch.manual_seed(5)  # the adapters' first values
        found.append(short_recovery(slice_model(tiny(), plan_for(tiny())), [batch], 2, learning_rate=1e-2)[1])
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(weight, other[name], atol=2e-4, rtol=1e-3)
