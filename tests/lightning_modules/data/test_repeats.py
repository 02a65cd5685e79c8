"""Blocks in which a passage comes again."""

import pytest
import torch

from lightning_modules.data.repeats import Repeats
from lightning_modules.data.sampler import FixedOrderSampler
from tests.lightning_modules.data.toy import Toy


class Numbers:
    """Blocks in which every token is another number."""

    def __init__(self, width):
        self.width = width

    def __len__(self):
        return 50

    def __getitems__(self, indices):
        ids = torch.stack([torch.arange(self.width) + max(i, 0) * self.width for i in indices])
        padding = torch.tensor([i == FixedOrderSampler.PADDING for i in indices])
        return {"input_ids": ids, "labels": ids.masked_fill(padding[:, None], -100)}


@pytest.mark.parametrize("width", [6, 64, 512])
def test_the_rest_of_a_block_is_one_of_its_passages_over_and_over(width):
    rows = list(range(50))
    plain, batch = Numbers(width).__getitems__(rows)["input_ids"], Repeats(Numbers(width), 1.0).__getitems__(rows)
    assert torch.equal(batch["input_ids"], batch["labels"])
    for before, after in zip(plain, batch["input_ids"], strict=True):
        place = int((before != after).nonzero()[0])
        start = int((before == after[place]).nonzero()[0])
        period = int((after[place:] == after[place]).nonzero()[1]) if (after[place:] == after[place]).sum() > 1 else 0
        rest = after[place:]
        passage = before[start : start + (period or len(rest))]
        assert torch.equal(after[:place], before[:place]) and start + len(passage) <= place
        assert torch.equal(rest, passage.repeat(len(rest) // len(passage) + 1)[: len(rest)])


def test_the_share_is_met_and_a_block_is_always_the_same():
    plain, some = Numbers(64), Repeats(Numbers(64), 0.4)
    rows = list(range(50))
    first, again = some.__getitems__(rows)["input_ids"], some.__getitems__(rows[::-1])["input_ids"].flip(0)
    assert torch.equal(first, again)
    assert 10 <= int((first != plain.__getitems__(rows)["input_ids"]).any(1).sum()) <= 30


def test_rows_that_fill_up_keep_labels_that_do_not_count():
    labels = Repeats(Numbers(64), 1.0).__getitems__([0, FixedOrderSampler.PADDING])["labels"]
    assert (labels[1] == -100).all() and (labels[0] >= 0).all()


def test_only_training_blocks_repeat(tmp_path):
    def blocks(repeats):
        data = Toy(cache_dir=str(tmp_path), repeats=repeats)
        data.prepare_data()
        data.setup("fit")
        return [next(iter(loader()))["input_ids"] for loader in (data.predict_dataloader, data.val_dataloader)]

    (train, val), (plain, plain_val) = blocks(1.0), blocks(0.0)
    assert torch.equal(val, plain_val) and not torch.equal(train, plain)
    with pytest.raises(ValueError, match="repeats"):
        Toy(repeats=1.5)
