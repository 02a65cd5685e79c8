"""The loss with one layer cut is that of the model with these parts masked; a killed measurement goes on."""

import pytest

from lightning_modules.perplexity import mean_nll
from lightning_modules.structured_pruning import layer_curves
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.masking import masked
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from tests.lightning_modules.structured_pruning.toy import batches, tiny


def _plans(model):
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    cuts = [(1, 2), (2, 3)]
    return shapes, [
        [LayerPlan(list(range(g)), list(range(shape.channels * c // 4))) for g, c in cuts] for shape in shapes
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_losses_are_those_of_the_model_with_the_parts_masked(name, tmp_path):
    model = tiny(name)
    shapes, plans = _plans(model)
    found = layer_curves.measure(model, batches(2), plans, tmp_path / "curves.json")
    for index, mine in enumerate(plans):
        for plan, loss in zip(mine, found[index], strict=True):
            layers = [LayerPlan(list(range(s.groups)), list(range(s.channels))) for s in shapes]
            layers[index] = plan
            whole = PruningPlan(layers, [[s.groups, s.channels] for s in shapes], "", "")
            with masked(model, whole):
                assert loss == pytest.approx(mean_nll(model, batches(2)), rel=1e-6)
    assert len({round(loss, 5) for mine in found for loss in mine}) == 8, "or cuts could be mistaken for each other"


def test_an_interrupted_measurement_goes_on(tmp_path):
    model = tiny()
    _, plans = _plans(model)
    whole = layer_curves.measure(model, batches(2), plans, tmp_path / "whole.json")
    told: list[int] = []

    def stop(count: int) -> None:
        told.append(count)
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer_curves.measure(model, batches(2), plans, tmp_path / "curves.json", stop)
    assert layer_curves.measure(model, batches(2), plans, tmp_path / "curves.json", told.append) == whole
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]
