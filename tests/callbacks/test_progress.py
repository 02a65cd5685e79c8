"""What is shown while a Trainer works: on a terminal, in a log, in CI."""

import sys
import warnings

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

import callbacks.progress
from callbacks.progress import Progress
from common.progress import duration


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx): ...

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


ROWS = DataLoader(torch.ones(12, 2), batch_size=2)


def _trainer(**options):
    warnings.simplefilter("ignore")
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(**quiet, callbacks=[Progress()], **{"num_sanity_val_steps": 0, **options})


@pytest.fixture
def clock(monkeypatch):
    """Every look at it is 20 s later: a line is due at every second batch."""
    now = iter(range(0, 10**6, 20))
    monkeypatch.setattr(callbacks.progress.time, "monotonic", lambda: float(next(now)))
    monkeypatch.delenv("CI", raising=False)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_loop_over_batches_says_in_a_log_where_it_is_and_how_long_it_takes(command, clock, capsys):
    getattr(_trainer(), command)(Net(), ROWS)
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch" in line]
    name = {"validate": "validation"}.get(command, command)
    assert len(lines) >= 2 and all(line.startswith(f"{name}: batch ") and "/6, " in line for line in lines)
    # three looks after two batches: 60 s for 2 of 6
    assert lines[0] == f"{name}: batch 2/6, {duration(120)} left"


def test_training_says_its_steps_its_loss_and_the_time_left(clock, capsys):
    _trainer(max_steps=4, accumulate_grad_batches=2).fit(Net(), ROWS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines and all("/4, loss 0." in line and "s/step" in line and line.endswith(" left") for line in lines)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_nothing_is_said_in_ci(command, clock, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    getattr(_trainer(max_steps=4), command)(Net(), ROWS)
    captured = capsys.readouterr()
    assert "batch" not in captured.out and "step " not in captured.out


@pytest.mark.parametrize(
    ("options", "epochs", "batches"),
    [
        ({"max_steps": 4, "accumulate_grad_batches": 2}, ["Epoch 1", "Epoch 2"], [6, 2]),
        ({"max_steps": 1, "accumulate_grad_batches": 4}, ["Epoch 1"], [4]),
        ({"max_epochs": 2}, ["Epoch 1/2", "Epoch 2/2"], [6, 6]),
    ],
)
def test_the_bar_counts_micro_batches_and_names_only_epochs_that_there_are(options, epochs, batches, monkeypatch):
    shown = {}

    class Watched(Progress):
        def on_train_batch_end(self, *given):
            super().on_train_batch_end(*given)
            bar = self.progress.tasks[self.train_progress_bar_id]
            assert bar.completed <= bar.total
            shown[bar.description.strip()] = (bar.completed, bar.total)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("CI", raising=False)
    trainer = _trainer(**options)
    trainer.callbacks = [Watched()]
    trainer.fit(Net(), ROWS)
    assert shown == {epoch: (count, count) for epoch, count in zip(epochs, batches, strict=True)}
