"""Associative recall: every answer is in the context, where the sample says."""

import pytest
import torch

from lightning_modules.data.recall import Recall


def _data(**options):
    data = Recall(**{"context": 40, "facts": 6, "questions": 4, "batch_size": 8, "max_val_blocks": 20, **options})
    data.setup("fit")
    return data


def test_every_question_is_answered_by_the_fact_with_its_key():
    data = _data()
    for batch in data.val_dataloader():
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape[1] == data.block_size == 40 + 8
        for row in range(len(ids)):
            words = data.tokenizer.convert_ids_to_tokens(ids[row].tolist())
            context = words[:40]
            assert sum(word.startswith("key") for word in context) == 6
            for question in range(4):
                place = int(batch["evidence"][row, question])
                key, value = words[40 + 2 * question :][:2]
                assert key.startswith("key") and value.startswith("value")
                assert context[place - 1 : place + 1] == [key, value] and context.count(key) == 1
        asked = labels != -100
        assert asked.sum(1).tolist() == [4] * len(ids) and torch.equal(labels[asked], ids[asked])


def test_samples_follow_from_their_number_and_validation_is_never_trained_on():
    first, again = _data(), _data()
    one, two = (next(iter(d.val_dataloader()))["input_ids"] for d in (first, again))
    assert torch.equal(one, two)
    train = next(iter(first.predict_dataloader()))["input_ids"]
    assert not (train[:, None] == one[None]).all(-1).any()
    assert len({tuple(row.tolist()) for row in train}) == 8


def test_places_of_facts_reach_over_the_whole_context():
    data = _data(max_val_blocks=400, batch_size=400)
    places = next(iter(data.val_dataloader()))["evidence"].flatten()
    assert places.min() == 2 and places.max() == 39
    assert 18 < places.float().mean() < 23


@pytest.mark.parametrize("options", [{"facts": 20}, {"questions": 7}, {"keys": 5}])
def test_more_than_fits_is_refused(options):
    with pytest.raises(ValueError, match="facts"):
        _data(**options)


def test_a_run_goes_on_where_it_stopped_with_another_batch_size():
    data, other = _data(), _data(batch_size=4)
    straight = [batch["sample_id"].tolist() for _, batch in zip(range(4), data.train_dataloader(), strict=False)]
    other.load_state_dict(data.state_dict() | {"samples": 16, "seed": data.position().seed})
    assert next(iter(other.train_dataloader()))["sample_id"].tolist() == straight[2][:4]
    assert data.state_dict()["data"] != _data(keys=17).state_dict()["data"]


def test_it_is_tested_on_its_validation_samples_and_calibrated_on_training_ones():
    data = _data(max_train_blocks=30)
    for one, other in zip(data.test_dataloader(), data.val_dataloader(), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert [batch["sample_id"].tolist() for batch in data.calibration(10)] == [
        [0, 3, 6, 9, 12, 15, 18, 21],
        [24, 27],
    ]
    assert data.inputs() == []
