"""Arguments, loaders and resuming, through real Trainers."""

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_modules.data.sampler import Position, ResumableSampler
from tests.lightning_modules.data.toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13


class Watcher(L.LightningModule):
    """Remembers the first tokens of every row it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.validated: list[tuple[list[int], int]] = []

    def training_step(self, batch, batch_idx):
        self.seen += [tuple(row) for row in batch["input_ids"].tolist()]
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated += [
            (row.tolist(), int((labels != -100).sum())) for row, labels in zip(*batch.values(), strict=True)
        ]

    def configure_optimizers(self):
        # As learning-rate schedules do. If max_epochs is set, it makes Lightning create the loaders.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**kwargs):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(**{"accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0, **quiet, **kwargs})


def fit(cache, steps, checkpoint=None, accumulate=2, max_epochs=None, **data):
    module = Watcher()
    # Validation is on: without it, Lightning 2.6.6 takes one stray batch on resuming exactly at the end of an epoch.
    run = trainer(max_steps=steps, accumulate_grad_batches=accumulate, limit_val_batches=1, max_epochs=max_epochs)
    run.fit(module, Toy(cache_dir=str(cache), max_train_blocks=50, **data), ckpt_path=checkpoint, weights_only=True)
    return run, module.seen


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    Toy(cache_dir=str(folder)).prepare_data()
    return folder


@pytest.fixture
def toy(cache):
    data = Toy(cache_dir=str(cache))
    data.setup("fit")
    return data


@pytest.mark.parametrize("field", ["block_size", "batch_size", "num_proc", "max_train_blocks", "max_val_blocks"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        Toy(**{field: 0})


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        Toy(vocab_size=0)
    with pytest.raises(ValueError, match="num_workers must not be negative"):
        Toy(num_workers=-1)


def test_batches(toy):
    batch = next(iter(toy.train_dataloader()))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "input_ids": ((4, 16), torch.int64),
        "labels": ((4, 16), torch.int64),
    }
    assert torch.equal(batch["input_ids"], batch["labels"])
    batch["labels"][:] = 0
    assert batch["input_ids"].any(), "labels must be a tensor of their own"


def test_train_loader_is_one_shuffled_pass(toy):
    rows = [tuple(row) for batch in toy.train_dataloader() for row in batch["input_ids"].tolist()]
    assert len(rows) == len(toy.train) // 4 * 4
    everything = [tuple(row) for row in toy.train[:]["input_ids"].tolist()]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(everything)
    assert rows != everything[: len(rows)]


def test_validation_is_the_whole_split_in_order(toy):
    rows = [row for batch in toy.val_dataloader() for row in batch["input_ids"].tolist()]
    assert rows == toy.val[:]["input_ids"].tolist()
    assert rows == [row for batch in toy.test_dataloader() for row in batch["input_ids"].tolist()]


def test_rows_that_only_fill_up_have_no_labels(toy):
    labels = toy._dataset("val").__getitems__([0, -1])["labels"]
    assert (labels[0] != -100).all() and (labels[1] == -100).all()


def test_limits_take_the_first_blocks(cache, toy):
    few = Toy(cache_dir=str(cache), max_train_blocks=7, max_val_blocks=2)
    few.setup("fit")
    assert few.train[:]["input_ids"].tolist() == toy.train[:7]["input_ids"].tolist()
    assert (few.describe()["blocks"], few.describe()["hash"]) == ({"val": 2, "train": 7}, toy.describe()["hash"])


def test_too_few_blocks_for_a_batch(cache):
    data = Toy(cache_dir=str(cache), max_train_blocks=3)
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"train: 3 blocks are fewer than one global batch \(batch_size 4 on 1 ranks\)"
    ):
        data.train_dataloader()


def test_training_crosses_epochs_without_losing_a_block(cache):
    _, seen = fit(cache, 13, accumulate=1)  # 52 rows; one Trainer epoch of 50 blocks is 12 batches
    assert len(set(seen[:50])) == 50


# With both limits set, the loaders are made before the checkpoint is read (see configure_optimizers above).
@pytest.mark.parametrize("workers, max_epochs", [(0, None), (0, 100), (1, 100)])
@pytest.mark.parametrize("stop", [1, 5, 6, 9])  # 24 batches make 2 epochs of 12; 6 and 12 steps are epoch ends
def test_resumed_run_sees_the_very_same_rows(cache, tmp_path, stop, workers, max_epochs):
    _, straight = fit(cache, 14, max_epochs=max_epochs)
    run, before = fit(cache, stop, max_epochs=max_epochs)
    run.save_checkpoint(tmp_path / "x.ckpt")
    _, after = fit(cache, 14, tmp_path / "x.ckpt", num_workers=workers, max_epochs=max_epochs)
    assert before + after == straight


@pytest.mark.parametrize("batch_size", [2, 8])
def test_resumed_run_continues_the_order_with_another_batch_size(cache, tmp_path, batch_size):
    _, straight = fit(cache, 12)
    run, before = fit(cache, 3)
    run.save_checkpoint(tmp_path / "x.ckpt")
    run, after = fit(cache, 6, tmp_path / "x.ckpt", batch_size=batch_size)
    assert before + after == straight[: len(before) + len(after)]
    run.save_checkpoint(tmp_path / "y.ckpt")
    _, last = fit(cache, 8, tmp_path / "y.ckpt")
    whole = before + after + last
    assert whole == straight[: len(whole)]


def test_resumed_run_keeps_the_seed_of_its_order(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    _, straight = fit(cache, 4)
    run, before = fit(cache, 2)
    run.save_checkpoint(tmp_path / "x.ckpt")
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    _, after = fit(cache, 4, tmp_path / "x.ckpt")
    assert before + after == straight
    assert fit(cache, 4)[1] != straight


def test_one_data_module_in_two_runs_starts_anew(cache):
    data = Toy(cache_dir=str(cache))
    seen = []
    for _ in range(2):
        module = Watcher()
        trainer(max_steps=3).fit(module, data)
        seen.append(module.seen)
    assert seen[0] == seen[1]


def test_checkpoint_of_another_tokenizer_is_refused(cache, toy, tmp_path):
    other = Toy(cache_dir=str(cache), vocab_size=290)
    other.prepare_data()
    other.setup("fit")
    message = r"checkpoint was made with byte-level BPE .* \(vocabulary 300, sha .*\); this run uses .*vocabulary 290"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(toy.state_dict())


def test_checkpoint_of_another_block_size_can_be_validated_but_not_continued(cache, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    first = Toy(cache_dir=str(cache))
    first.setup("fit")
    first.tokenizer.save_pretrained(str(tokenizer))
    run, _ = fit(cache, 1)
    run.save_checkpoint(tmp_path / "x.ckpt")

    def longer():
        return Toy(cache_dir=str(tmp_path), tokenizer=str(tokenizer), block_size=32)

    with pytest.raises(ValueError, match="trained on blocks of 16 tokens, this run has 32; set block_size to 16"):
        trainer(max_steps=2).fit(Watcher(), longer(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    module = Watcher()
    trainer(limit_val_batches=None).validate(module, longer(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert {len(row) for row, _ in module.validated} == {32}


def test_other_training_data_are_warned_about(cache, toy):
    fewer = Toy(cache_dir=str(cache), max_train_blocks=20)
    fewer.setup("fit")
    with pytest.warns(UserWarning, match="samples already seen may come again"):
        fewer.load_state_dict(toy.state_dict() | {"samples": 8})
    assert fewer.position() == Position(toy.position().seed, 8)


def _train_and_validate(cache, folder, inject):
    """On one of two ranks: three steps, validation, and a checkpoint."""
    module, data = Watcher(), Toy(cache_dir=str(cache), max_train_blocks=50, max_val_blocks=11)
    run = trainer(
        max_steps=3,
        strategy="ddp",
        devices=2,
        use_distributed_sampler=inject,
        limit_val_batches=None,
        val_check_interval=3,
    )
    run.fit(module, data)
    run.save_checkpoint(f"{folder}/ranks.ckpt")
    return module.seen, module.validated, type(run.train_dataloader.sampler).__name__


@pytest.mark.filterwarnings("ignore")  # of the ranks' processes, not of this one
@pytest.mark.parametrize("inject", [True, False])
def test_two_ranks_share_one_order_that_one_rank_can_continue(two_ranks, cache, tmp_path, inject):
    (seen, val, sampler), (seen2, val2, _) = two_ranks.run(_train_and_validate, cache, tmp_path, inject)
    assert sampler == ResumableSampler.__name__
    _, straight = fit(cache, 10, accumulate=1)
    together = [row for pair in zip(seen, seen2, strict=True) for row in pair]
    assert together == straight[:24]

    assert len(val) == len(val2) == 6
    data = Toy(cache_dir=str(cache), max_val_blocks=11)
    data.setup("fit")
    real = [row for pair in zip(val, val2, strict=True) for row, labels in pair if labels]
    assert real == data.val[:]["input_ids"].tolist()

    _, alone = fit(cache, 7, tmp_path / "ranks.ckpt", accumulate=1)
    assert together + alone == straight


def test_lightning_would_divide_any_other_sampler_again(toy):
    # The reason why ours derive from DistributedSampler; if this changes, they need not.
    connector = trainer(max_steps=1, strategy="ddp", devices=2)._data_connector
    assert connector._requires_distributed_sampler(DataLoader(toy.train, sampler=list(range(4))))
    assert not connector._requires_distributed_sampler(toy.train_dataloader())
    assert not connector._requires_distributed_sampler(toy.val_dataloader())


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_windows_predict_every_token_once_from_the_text_before_it(cache, stride):
    data = Toy(cache_dir=str(cache), max_val_blocks=4, val_stride=stride)
    data.setup("fit")
    text = data.val[:]["input_ids"].flatten()
    predicted = []
    for number, batch in enumerate(data._dataset("val")[i] for i in range(len(data._dataset("val")))):
        window, labels, start = batch["input_ids"][0], batch["labels"][0], number * stride
        assert torch.equal(window, text[start : start + 16])
        predicted += [start + t for t in range(1, 16) if labels[t] != -100]
    missed = set(range(1, 64)) - set(predicted)
    assert len(predicted) == len(set(predicted))
    assert missed == ({16, 32, 48} if stride == 16 else set(range(max(predicted) + 1, 64))) and len(missed) < 16
    assert (data._dataset("val").__getitems__([0, -1])["labels"][1] == -100).all()


def test_stride_is_checked():
    for stride in (0, 17):
        with pytest.raises(ValueError, match="val_stride must lie between 1 and block_size 16"):
            Toy(val_stride=stride)


def test_calibration_rows_are_spread_or_drawn_by_a_seed(toy):
    def rows(batches):
        return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]

    toy.setup("fit")
    everything = [tuple(row) for row in toy.train["input_ids"][:].tolist()]
    spread = toy.calibration(7)
    assert rows(spread) == [everything[i * len(everything) // 7] for i in range(7)]
    assert [len(batch["labels"]) for batch in spread] == [4, 3]
    one, again, other = (rows(toy.calibration(7, seed)) for seed in (1, 1, 2))
    assert one == again and len(set(one) & set(other)) < 7 and set(one) <= set(everything)
    assert sorted(rows(toy.calibration(len(everything), 3))) == sorted(everything)  # each row once
    rest = rows(toy.calibration(len(everything) - 7, 1, skip=7))  # text apart from what has been drawn
    assert sorted([*one, *rest]) == sorted(everything)
    with pytest.raises(ValueError, match="7 others are in use"):
        toy.calibration(len(everything) - 6, 1, skip=7)
    for count in (0, len(everything) + 1):
        with pytest.raises(ValueError, match=f"calibration_blocks is {count}, but the training text has only"):
            toy.calibration(count)


def test_data_say_what_a_perplexity_is_measured_on(toy, cache):
    assert toy.describe()["perplexity_on"] == "blocks of 16 tokens, no overlap, no BOS"
    assert Toy(cache_dir=str(cache), val_stride=4).perplexity_on == "windows of 16 tokens every 4, no BOS"
