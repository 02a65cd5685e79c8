"""Callbacks through real training on two ranks."""

import json
import math
import os
import time
import warnings
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from callbacks import GradientGuard, RunRecord, Throughput, TimeToQuality, Trace, TrafficMonitor
from callbacks.measurement import StepClock
from common.records import record
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.compressors.onebit import OneBit
from tests.strategies.engines import ENGINES, local


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"input_ids": torch.full((8,), index)}


class Net(L.LightningModule):
    """Linear regression that can be told to produce a NaN on rank 1 at one step."""

    def __init__(self, bad_step: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.bad_step = nn.Linear(8, 4), bad_step

    def training_step(self, batch, batch_idx):
        loss = self.net(batch["input_ids"].float() / 64).pow(2).mean()
        bad = self.trainer.global_step == self.bad_step and self.global_rank == 1
        return loss * (math.nan if bad else 1.0)

    def validation_step(self, batch, batch_idx):
        self.log("val/ppl", 100.0 / (1 + self.trainer.global_step), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def _fit(callbacks, folder, steps=8, bad_step=None, clip=None, engine="fsdp1", compressor=None, **trainer):
    warnings.simplefilter("ignore")
    module = Net(bad_step)
    run = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ENGINES[engine](compressor=compressor or Int8()),
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        gradient_clip_val=clip,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **trainer,
    )
    loader = DataLoader(Rows(), batch_size=2)
    run.fit(module, loader, DataLoader(Rows(), batch_size=32) if trainer else None)
    return run


def _guarded(nonfinite, folder, engine):
    guard = GradientGuard(nonfinite)
    try:
        run = _fit([guard], folder, bad_step=3, engine=engine)
    except FloatingPointError as error:
        return {"error": str(error)}
    weights = torch.cat([local(p.detach()).flatten() for p in run.strategy.model.parameters()])
    return {"counts": guard.summary(), "finite": bool(weights.isfinite().all()), "steps": run.global_step}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_on_one_rank_is_skipped_on_all_and_counted(engine, two_ranks, tmp_path):
    for result in two_ranks.run(_guarded, "skip", str(tmp_path), engine):
        assert result == {"counts": {"nan_steps": 1, "clipped_steps": 0}, "finite": True, "steps": 8}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_on_one_rank_stops_all_with_the_step(engine, two_ranks, tmp_path):
    for result in two_ranks.run(_guarded, "stop", str(tmp_path), engine):
        assert "step 3" in result["error"] and "skip" in result["error"]


def _clipped(folder):
    guard = GradientGuard()
    _fit([guard], folder, clip=1e-6)
    return guard.clipped_steps


def test_clipped_steps_are_counted(two_ranks, tmp_path):
    assert two_ranks.run(_clipped, str(tmp_path)) == [8, 8]


def _measured(folder):
    throughput, monitor = Throughput(warmup_steps=3), TrafficMonitor(warmup_steps=3, sample_every=4, nic="lo")
    _fit([throughput, monitor], folder)
    return throughput.summary(), monitor.summary()


def test_totals_cover_the_steps_after_warm_up(two_ranks, tmp_path):
    (speed, traffic), _ = two_ranks.run(_measured, str(tmp_path))
    assert speed["steps_measured"] == 5
    assert speed["tokens_per_s"] == pytest.approx(2 * 2 * 8 / speed["step_time_ms_mean"] * 1e3)
    # 36 parameters padded to 2 ranks: 18 int8 codes and one scale, each padded to 16 bytes
    assert traffic["bytes_compressed_total"] == 5 * (32 + 16)
    assert traffic["bytes_raw_total"] == 5 * 4 * 18
    assert traffic["bytes_nic_total"] >= 2 * traffic["bytes_compressed_total"]
    assert 0 < traffic["comm_ratio"] < 1 and traffic["compress_time_ms"] > 0
    assert 0 < traffic["grad_rel_error"] < 0.02 and traffic["grad_cos_sim"] > 0.999


def _with_feedback(folder):
    monitor, guard = TrafficMonitor(warmup_steps=3, sample_every=4), GradientGuard("skip")
    run = _fit([monitor, guard], folder, bad_step=6, compressor=ErrorFeedback(OneBit()))
    residuals = [unit.state["residual"] for unit in run.strategy.units]
    return monitor.summary(), guard.summary(), torch.cat(residuals)


def test_the_residuals_norm_is_reported_and_a_nan_step_is_seen_behind_error_feedback(two_ranks, tmp_path):
    for traffic, guard, residual in two_ranks.run(_with_feedback, str(tmp_path)):
        assert residual.isfinite().all() and residual.any()
        assert traffic["residual_norm"] == pytest.approx(residual.norm().item())
        assert guard["nan_steps"] == 1


def test_a_network_interface_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="nic0815"):
        TrafficMonitor(nic="nic0815")


def _recorded(folder):
    path = f"{folder}/results.jsonl"
    callbacks = [Throughput(2), TrafficMonitor(2), GradientGuard(), TimeToQuality(30.0, 1e9), RunRecord(path, "a")]
    with mock.patch.dict(os.environ, {record.LINK_RATE: "1gbit"}):  # as `bench link` does
        _fit(callbacks, folder, **_VALIDATED)
    if torch.distributed.get_rank() > 0:
        return None
    with open(path) as file:
        return json.loads(file.read())


_VALIDATED = {"val_check_interval": 2, "check_val_every_n_epoch": None}


def test_the_record_holds_what_every_callback_measured(two_ranks, tmp_path):
    fields, _ = two_ranks.run(_recorded, str(tmp_path))
    assert fields["run_name"] == "a" and fields["compress_method"] == "int8" and fields["steps"] == 8
    assert fields["compress_config"] == {"block_size": 256, "stochastic": False}
    assert "residual_norm" not in fields  # no error feedback
    assert fields["link_rate"] == "1gbit" and fields["link_emulated"] is True
    assert [point["step"] for point in fields["val_curve"]] == [2, 4, 6, 8]
    assert fields["val_ppl"] == pytest.approx(100 / 9)
    # 100/3 at step 2 misses the target of 30, 100/5 at step 4 meets it
    assert fields["time_to_target_ppl_s"] == fields["val_curve"][1]["train_s"]
    assert fields["ppl_at_fixed_time"] == pytest.approx(100 / 9)
    assert fields["dataset"] is None and fields["val_loss"] is None  # not measured is null, never 0


def _traced(folder):
    trace = Trace(wait=2, warmup=1, active=2)
    _fit([trace], folder)
    return trace.summary()


def test_traces_of_all_ranks_are_written_and_summarised(two_ranks, tmp_path):
    summary, _ = two_ranks.run(_traced, str(tmp_path))
    assert {p.name for p in (tmp_path / "trace").iterdir()} == {"rank0.pt.trace.json.gz", "rank1.pt.trace.json.gz"}
    assert len(summary["trace"]["steps"]) == 2 and summary["trace"]["world_size"] == 2
    assert 0 < summary["trace"]["comm_ratio"] < 1


def test_trace_needs_a_step():
    with pytest.raises(ValueError, match="active"):
        Trace(active=0)


def test_step_clock_adds_micro_batches_and_skips_what_lies_between():
    clock = StepClock()
    with mock.patch.object(time, "perf_counter", side_effect=[0.0, 1.0, 5.0, 7.0, 9.0, 10.0]):
        clock.start()
        clock.stop(step_done=False)
        clock.start()
        clock.stop(step_done=True)
        clock.start()
        clock.stop(step_done=True)
    assert clock.all_ms() == [3000.0, 1000.0] and clock.last_ms() == 1000.0


def test_a_target_that_was_not_met_is_null():
    callback = TimeToQuality(target_ppl=1.0, fixed_time_s=0.5)
    callback.load_state_dict({"curve": [{"train_s": 1.0, "step": 1, "val_ppl": 9.0}], "trained_s": 1.0})
    fields = callback.summary()
    assert fields["time_to_target_ppl_s"] is None and fields["ppl_at_fixed_time"] is None


def test_only_training_counts_as_time_to_a_quality(monkeypatch):
    """The clock says 10 when training starts; then 3 s of training, 100 s of validation, 4 s, 100 s, 5 s."""
    now = [10.0]
    monkeypatch.setattr("callbacks.time_to_quality.time.perf_counter", lambda: now[0])
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=True, global_step=0, callback_metrics={})
    callback = TimeToQuality(target_ppl=20.0, fixed_time_s=5.0)

    def validated(seconds, ppl):
        callback.on_validation_start(trainer, None)
        now[0] += seconds
        trainer.global_step += 1
        trainer.callback_metrics = {"val/ppl": ppl}
        callback.on_validation_end(trainer, None)

    validated(50, 999.0)  # Lightning's check before training
    trainer.sanity_checking = False
    callback.on_train_start(trainer, None)
    now[0] += 3
    validated(100, 30.0)
    now[0] += 4
    validated(100, 20.0)
    now[0] += 5
    assert [point["train_s"] for point in callback.curve] == [3.0, 7.0]
    assert callback.state_dict()["trained_s"] == 12.0
    fields = callback.summary()
    assert fields["time_to_target_ppl_s"] == 7.0 and fields["ppl_at_fixed_time"] == 30.0


@pytest.mark.parametrize("batch, tokens", [
    ({"input_ids": torch.zeros(2, 5)}, 10),
    ({"input_ids": torch.zeros(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]])}, 5),
    (torch.zeros(2, 5), 0),
    ({"pixels": torch.zeros(2, 5)}, 0),
])  # fmt: skip
def test_padding_is_no_token_per_second(batch, tokens):
    clocked = Throughput()
    for _ in range(2):  # micro-batches of a step
        clocked.on_train_batch_start(None, None, batch, 0)
    assert clocked._of_step == 2 * tokens


class _Padded(Rows):
    """Rows of 1, 2, … tokens and padding; two ranks see even and odd ones."""

    def __getitem__(self, index):
        return {"input_ids": torch.full((80,), index), "attention_mask": (torch.arange(80) <= index).long()}


class _PaddedNet(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step({"input_ids": batch["input_ids"][:, :8]}, batch_idx)


def _padded(folder, ckpt_path, steps):
    throughput = Throughput(warmup_steps=1)
    run = L.Trainer(
        accelerator="cpu", devices=2, strategy=ENGINES["fsdp2"](compressor=Int8()), max_steps=steps, logger=False,
        callbacks=[throughput, ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)], default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    sampler = DistributedSampler(_Padded(), shuffle=False)
    run.fit(_PaddedNet(), DataLoader(_Padded(), batch_size=2, sampler=sampler), ckpt_path=ckpt_path)
    return throughput.state_dict()["tokens"].tolist(), throughput.clock.all_ms(), throughput.summary()


def test_padding_that_varies_over_steps_and_ranks_is_counted_in_each_also_when_resumed(two_ranks, tmp_path):
    two_ranks.run(_padded, str(tmp_path), None, 2)
    (tokens, ms, speed), (others, *_) = two_ranks.run(_padded, str(tmp_path), str(tmp_path / "last.ckpt"), 4)
    assert tokens == others and tokens[:2] == [1 + 2 + 3 + 4, 5 + 6 + 7 + 8]
    assert speed["tokens_per_s"] == pytest.approx((tokens[1] + tokens[3]) / (ms[1] + ms[3]) * 1e3)


class _Event:
    """Stands for a CUDA event: the device passes it when told."""

    passed = 0

    def __init__(self, enable_timing):
        self.number = None

    def record(self):
        type(self).made = self.number = getattr(type(self), "made", 0) + 1

    def query(self):
        return self.number <= self.passed

    def elapsed_time(self, end):
        return float(end.number - self.number)


def test_step_clock_reads_the_devices_times_once_and_keeps_no_event(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    clock = StepClock()

    def step():
        clock.start()
        clock.stop(step_done=True)

    step()
    step()
    assert clock.last_ms() is None and len(clock._unfinished) == 2
    _Event.passed = 4
    step()
    assert clock.last_ms() == 1.0 and clock.finished == 2 and len(clock._unfinished) == 1


class _Constant(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss - loss.detach() + 4.0


def test_the_recorded_loss_is_that_of_a_token_however_many_batches_a_step_has(tmp_path):
    path = tmp_path / "runs.jsonl"
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=4, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[RunRecord(path, "a")],
    )  # fmt: skip
    trainer.fit(_Constant(), DataLoader(Rows(), batch_size=2))
    (found,), _ = record.read(path)
    assert found["train_loss"] == pytest.approx(4.0)
