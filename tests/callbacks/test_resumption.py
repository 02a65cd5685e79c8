"""A resumed run's record is that of the uninterrupted one, in bytes and steps."""

import json
import warnings
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import GradientGuard, RunRecord, Throughput, TimeToQuality, TrafficMonitor
from callbacks.log_config import LogConfig
from callbacks.measurement import StepClock
from common.records import record
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.onebit import OneBit
from tests.callbacks.test_callbacks import Net, Rows
from tests.strategies.engines import ENGINES


class Equal(Rows):
    """The order of rows, which is the data's business, cannot matter here."""

    def __getitem__(self, index):
        return super().__getitem__(7)


def _leg(folder, name, steps, engine, resume=False, accumulate=1):
    """One process's part of a run, up to so many steps in all."""
    warnings.simplefilter("ignore")
    measuring = [
        Throughput(3),
        TrafficMonitor(3, sample_every=2, nic="lo"),
        GradientGuard(),
        TimeToQuality(),
        RunRecord(f"{folder}/{name}.jsonl", name),
    ]
    run = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ENGINES[engine](compressor=ErrorFeedback(OneBit())),
        max_steps=steps,
        gradient_clip_val=1e-6,
        accumulate_grad_batches=accumulate,
        callbacks=[*measuring, ModelCheckpoint(f"{folder}/{name}", every_n_train_steps=1, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=4 * accumulate,
        check_val_every_n_epoch=None,
    )
    last = f"{folder}/{name}/last.ckpt" if resume else None
    run.fit(Net(), DataLoader(Equal(), batch_size=2), DataLoader(Rows(), batch_size=32), ckpt_path=last)
    return run.global_step


_TIMES = {
    "comm_ratio",
    "effective_bandwidth",
    "effective_bandwidth_raw",
    "host_peak_rss_gb",
    "tokens_per_s",
    "val_curve",
    "monitor_ms_per_step",
}


def _counted(fields):
    """What does not depend on the clock or on which process wrote it."""
    moving = {"run_id", "run_name", "resumed_at", "date", "bytes_nic_total", "packets_nic_total"} | _TIMES
    kept = {name: value for name, value in fields.items() if name not in moving and "time" not in name}
    return {name: pytest.approx(value) if isinstance(value, float) else value for name, value in kept.items()}


@pytest.mark.parametrize(("engine", "accumulate"), [("fsdp1", 1), ("fsdp2", 2), ("ddp", 1)])
def test_the_record_covers_all_legs(engine, accumulate, two_ranks, tmp_path):
    options = {"engine": engine, "accumulate": accumulate}
    two_ranks.run(_leg, str(tmp_path), "whole", 9, **options)
    for steps, resume in ((2, False), (6, True), (9, True)):  # the first ends within the warm-up
        (tmp_path / "parts.jsonl").unlink(missing_ok=True)
        assert two_ranks.run(_leg, str(tmp_path), "parts", steps, resume=resume, **options) == [steps, steps]
    (whole,), _ = record.read(tmp_path / "whole.jsonl")
    (parts,), _ = record.read(tmp_path / "parts.jsonl")
    assert _counted(parts) == _counted(whole)
    assert parts["steps_measured"] == 6 and parts["bytes_compressed_total"] > 0 and parts["clipped_steps"] == 9
    assert [point["step"] for point in parts["val_curve"]] == [point["step"] for point in whole["val_curve"]] == [4, 8]
    assert parts["val_ppl"] == whole["val_ppl"]
    assert parts["bytes_nic_total"] >= 2 * parts["bytes_compressed_total"]
    assert whole["resumed_at"] == [] and parts["resumed_at"] == [2, 6]


def test_resuming_a_finished_run_writes_no_second_record(two_ranks, tmp_path):
    path = tmp_path / "run.jsonl"
    two_ranks.run(_leg, str(tmp_path), "run", 5, "fsdp2")
    before = path.read_text()
    two_ranks.run(_leg, str(tmp_path), "run", 5, "fsdp2", resume=True)
    assert path.read_text() == before and json.loads(before)["steps"] == 5


def _config(text):
    """A LogConfig that says ``text``."""
    return type("Config", (LogConfig,), {"__init__": lambda self: None, "text": lambda self: text, "setup": _nothing})()


def _nothing(*_, **__):
    pass


@pytest.mark.parametrize(("trained", "config", "recorded"), [
    (True, "lr: 2\nckpt_path: a.ckpt\n", True),
    (True, "lr: 1\nckpt_path: a.ckpt\n", False),
    (False, "lr: 2\n", False),
])  # fmt: skip
def test_another_run_from_the_same_checkpoint_gets_its_record(trained, config, recorded, tmp_path):
    path = tmp_path / "results.jsonl"
    record.append(path, {"kind": "run", "run_id": "one", "steps": 5, "config": "lr: 1\nckpt_path: null\n"})
    callback = RunRecord(str(path))
    callback.load_state_dict({"run_id": "one", "resumed": [], "validated": {}, "losses": []})
    callback._trained = trained
    trainer = SimpleNamespace(global_step=5, callbacks=[_config(config)])
    assert callback._say_nothing_to_do(trainer) is not recorded


def test_a_run_that_died_before_its_record_gets_it_when_resumed(two_ranks, tmp_path):
    path = tmp_path / "run.jsonl"
    two_ranks.run(_leg, str(tmp_path), "run", 5, "fsdp2")
    (whole,), _ = record.read(path)
    path.unlink()
    two_ranks.run(_leg, str(tmp_path), "run", 5, "fsdp2", resume=True)
    (again,), _ = record.read(path)
    assert _counted(again) == _counted(whole) and again["run_id"] == whole["run_id"]
    assert again["step_time_ms_mean"] == pytest.approx(whole["step_time_ms_mean"])


def test_a_resumed_clock_leaves_out_every_warm_up():
    first, second = StepClock(), StepClock()
    first.load_state_dict({"ms": torch.tensor([90.0, 1, 2, 3], dtype=torch.float64), "resumed": []})
    second.load_state_dict({"ms": torch.tensor([90.0, 1, 2, 80, 3], dtype=torch.float64), "resumed": [3]})
    assert first.warm(1) == [1, 2, 3] and second.warm(1) == [1, 2, 4]
    assert second.all_ms() == [90, 1, 2, 80, 3]
