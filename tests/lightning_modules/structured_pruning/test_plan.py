"""Plans that are damaged, contradict themselves, or belong to another model are refused."""

import json

import pytest

from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.structured_pruning.toy import KEPT, plan_for, tiny


def _written(path, **changes) -> None:
    plan_for(tiny()).save(path)
    fields = json.loads(path.read_text()) | changes
    del fields["sha256"]  # changed on purpose
    path.write_text(json.dumps(fields))


def test_a_plan_comes_back_as_it_was(tmp_path):
    plan = plan_for(tiny())
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"groups": [], "channels": [1]}, "layer 0: no groups are kept; keep at least one, or drop the whole layer"),
        ({"groups": [1], "channels": []}, "layer 0: no channels are kept"),
        ({"groups": [4], "channels": [1]}, "layer 0: kept groups must lie in 0 … 3"),
        ({"groups": [1, 0], "channels": [1]}, "layer 0: kept groups are not ascending"),
        ({"groups": [1], "channels": [3, 3]}, "layer 0: kept channels are not ascending"),
        ({"groups": [1]}, "channels"),
        ({"heads": [1]}, "heads"),
    ],
)
def test_a_layer_that_cannot_be_is_named(layer, message, tmp_path):
    _written(tmp_path / "plan.json", layers=[layer] + [{"groups": [0], "channels": [0]}] * 3)
    with pytest.raises(ValueError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(FileNotFoundError, match="run prune first"):
        PruningPlan.load(path)
    for text in ("{", "[]", "{}", '{"format": 7}', '"plan"'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a pruning plan"):
            PruningPlan.load(path)
    _written(path, layers=[])
    with pytest.raises(ValueError, match="0 layers but 4 shapes"):
        PruningPlan.load(path)
    _written(path, layers=[{"groups": [], "channels": []}] * 4)
    with pytest.raises(ValueError, match="no layer is kept"):
        PruningPlan.load(path)


def test_a_plan_for_another_model_is_refused():
    plan, other = plan_for(tiny()), tiny(seed=5)
    shapes = [shape_of(layer) for layer in decoder_layers(other)]
    with pytest.raises(ValueError, match="plan: made for toy with weights"):
        plan.check_fits(shapes, model_hash(other))
    with pytest.raises(ValueError, match="other numbers of groups or channels"):
        slice_model(tiny(intermediate_size=40), plan)
    with pytest.raises(ValueError, match="other numbers of groups or channels"):
        slice_model(tiny(num_hidden_layers=3), plan)


def test_hashes_are_of_the_weights_alone():
    assert model_hash(tiny()) == model_hash(tiny()) != model_hash(tiny(seed=1))
    changed = tiny()
    changed.model.layers[2].mlp.up_proj.weight.data[3, 4] += 1e-6
    assert model_hash(changed) != model_hash(tiny())


def test_models_without_grouped_queries_have_groups_of_one_head():
    model = tiny(num_key_value_heads=8)
    shape = shape_of(decoder_layers(model)[0])
    assert (shape.groups, shape.n_rep) == (8, 1)
    plan = plan_for(model, [LayerPlan([1, 5], [0, 1])] * 4)
    assert plan.layers[0].queries(1) == [1, 5]
    assert slice_model(model, plan).config.num_attention_heads == 2
    assert KEPT[1].queries(2) == [0, 1, 4, 5]


def test_a_flipped_bit_anywhere_in_a_plan_is_noticed(tmp_path):
    path = tmp_path / "plan.json"
    plan_for(tiny()).save(path)
    whole = path.read_bytes()
    for place in range(len(whole) - 1):  # the last is the end of the line
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"plan\.json"):
            PruningPlan.load(path)
