"""A layer's damage is the loss of the model that lacks just this layer; a killed measurement goes on."""

import copy

import pytest

from lightning_modules.perplexity import mean_nll
from lightning_modules.structured_pruning.layer_damage import measure, measured
from tests.lightning_modules.structured_pruning.toy import batches, ids, tiny, two_samples


def _without(model, index: int):
    """The model built from the other layers."""
    shorter = copy.deepcopy(model)
    del shorter.model.layers[index]
    for number, layer in enumerate(shorter.model.layers):
        layer.self_attn.layer_idx = number
    shorter.config.num_hidden_layers = len(shorter.model.layers)
    return shorter


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_damages_are_losses_of_models_without_the_layer(name, tmp_path):
    model, told = tiny(name), []
    found = measure(model, batches(3), tmp_path / "damage.json", told.append)
    assert found.dense == pytest.approx(mean_nll(model, batches(3)))
    expected = [mean_nll(_without(model, index), batches(3)) for index in range(4)]
    assert found.without == pytest.approx(expected, rel=1e-6)
    assert len({round(loss, 4) for loss in [found.dense, *expected]}) == 5, "or layers could be mistaken for each other"
    assert told == list(range(1, 16))


def test_damages_are_of_samples_not_of_rows(tmp_path):
    """Two samples in one row, or padded under each other, are worth what they are worth alone."""
    one, two = ids(1, 9, seed=3), ids(1, 7, seed=4)
    alone = [{"input_ids": one, "labels": one}, {"input_ids": two, "labels": two}]
    model = tiny()
    expected = measure(model, alone, tmp_path / "alone.json")
    for name, batch in two_samples().items():
        found = measure(model, [batch], tmp_path / f"{name}.json")
        assert [found.dense, *found.without] == pytest.approx([expected.dense, *expected.without], rel=1e-5)


def test_an_interrupted_measurement_goes_on_and_a_damaged_file_counts_as_none(tmp_path):
    model, path = tiny(), tmp_path / "damage.json"
    whole = measure(model, batches(2), path)

    def stop(count: int) -> None:
        if count == 5:
            raise KeyboardInterrupt

    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches(2), path, stop)
    assert measured(path) == [whole.dense, whole.without[0]]
    layers = model.model.layers
    assert not any("forward" in vars(one) or one._forward_pre_hooks for one in layers), "the skipped layer is back"
    told: list[int] = []
    assert measure(model, batches(2), path, told.append) == whole and told == list(range(5, 11))
    path.write_text(path.read_text().replace("[", "[1", 1))
    assert measured(path) == [] and measured(tmp_path / "nothing.json") == []
