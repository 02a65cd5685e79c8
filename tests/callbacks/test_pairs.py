"""Every callback works without the others: alone, and in every pair."""

import itertools
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from callbacks import (
    GracefulStop,
    GradientGuard,
    Progress,
    RunLog,
    RunRecord,
    Throughput,
    TimeToQuality,
    Trace,
    TrafficMonitor,
)
from common.records import record
from strategies import CompressedFSDP2
from strategies.compressors.int8 import Int8
from tests.callbacks.test_callbacks import Net, Rows

MAKE = {
    "GracefulStop": lambda folder: GracefulStop(),
    "GradientGuard": lambda folder: GradientGuard(),
    "Progress": lambda folder: Progress(),
    "RunLog": lambda folder: RunLog(),
    "RunRecord": lambda folder: RunRecord(f"{folder}/results.jsonl", "a"),
    "Throughput": lambda folder: Throughput(1),
    "TimeToQuality": lambda folder: TimeToQuality(30.0),
    "Trace": lambda folder: Trace(wait=0, warmup=0, active=1),
    "TrafficMonitor": lambda folder: TrafficMonitor(1, sample_every=1),
}


def _together(names):
    """Train three steps with these callbacks; the record, where one of them writes it, or what went wrong."""
    warnings.simplefilter("ignore")
    rank = torch.distributed.get_rank()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = L.Trainer(
                accelerator="cpu",
                devices=2,
                strategy=CompressedFSDP2(compressor=Int8()),
                max_steps=3,
                callbacks=[MAKE[name](folder) for name in names],
                default_root_dir=folder,
                logger=False,
                enable_progress_bar="Progress" in names,
                enable_model_summary=False,
                enable_checkpointing=False,
                num_sanity_val_steps=0,
                val_check_interval=2,
                check_val_every_n_epoch=None,
            )
            run.fit(Net(), DataLoader(Rows(), batch_size=2), DataLoader(Rows(), batch_size=32))
            torch.distributed.barrier()  # a folder is rank 0's, too, until it has written
            path = Path(folder) / "results.jsonl"
            return record.read(path)[0] if rank == 0 and "RunRecord" in names else None
        except Exception as error:
            return f"{'+'.join(names)}: {type(error).__name__}: {error}"


def _all(combinations):
    return [_together(names) for names in combinations]


def test_every_callback_alone_and_every_pair(two_ranks):
    combinations = [(name,) for name in MAKE] + list(itertools.combinations(MAKE, 2))
    results, others = two_ranks.run(_all, combinations)
    assert [found for found in results + others if isinstance(found, str)] == []
    by_names = dict(zip(combinations, results, strict=True))
    (alone,) = by_names["RunRecord",]
    assert alone["steps"] == 3 and alone["tokens_per_s"] is None and alone["bytes_compressed_total"] is None
    (counted,) = by_names["RunRecord", "TrafficMonitor"]
    assert counted["steps_measured"] == 2 and counted["bytes_compressed_total"] > 0
    (timed,) = by_names["RunRecord", "Throughput"]
    assert timed["steps_measured"] == 2 and timed["tokens_per_s"] > 0
