"""The log of a run: what was said and measured, in order, and how it ended."""

import re

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from callbacks import RunLog
from tests.callbacks.test_callbacks import Net, Rows


class Logged(Net):
    fails_at = None

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fails_at:
            raise RuntimeError("out of luck")
        if batch_idx == 1:
            rank_zero_info("something to know")
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def _fit(folder, logger=True, fails_at=None):
    module = Logged()
    module.fails_at = fails_at
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        logger=CSVLogger(folder, name="logs", version="one") if logger else False,
        callbacks=[RunLog()],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, DataLoader(Rows(), batch_size=2), DataLoader(Rows(), batch_size=32))


@pytest.mark.filterwarnings("ignore")
def test_messages_metrics_and_the_end_stand_in_order_and_a_further_run_is_appended(tmp_path):
    _fit(tmp_path)
    lines = (tmp_path / "logs/one/run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    told = [line[20:] for line in lines]
    assert told[0] == "fit: Logged on 1 ranks" and told[-1] == "fit ended at step 4"
    assert sum("something to know" in line for line in told) == 1
    steps = [line for line in told if line.startswith("step ")]
    assert [line.partition(":")[0] for line in steps] == ["step 2", "step 4"] and all("loss" in line for line in steps)
    assert [line.partition(":")[0] for line in told if line.startswith("val")] == [
        "validation at step 2", "validation at step 4"]  # fmt: skip
    with pytest.raises(RuntimeError, match="luck"):
        _fit(tmp_path, fails_at=2)
    again = (tmp_path / "logs/one/run.log").read_text().splitlines()
    assert again[: len(lines)] == lines and any("RuntimeError: out of luck" in line for line in again)
    rank_zero_info("of nobody's run")
    assert "nobody" not in (tmp_path / "logs/one/run.log").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_log_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "logs/one").mkdir(parents=True)
    (tmp_path / "logs/one/run.log").mkdir()
    _fit(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_without_logs_nothing_is_written(tmp_path):
    _fit(tmp_path, logger=False)
    assert not list(tmp_path.rglob("run.log"))
