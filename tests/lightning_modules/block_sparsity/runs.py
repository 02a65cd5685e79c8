"""A tiny Llama, made-up text, and runs on them."""

import warnings
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import TierSchedule
from lightning_modules.block_sparsity import BlockSparsity
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from tests.lightning_modules.data.toy import Toy

SIZES = {"block": 8, "topk": 6, "calibration_blocks": 4, "warmup_steps": 0, "learning_rate": 1e-2}
SCHEDULE = {"iterations": 3, "dense": 0.3, "mid_2_4": 0.4, "topk": 0.3, "epochs": 1}


def data_of(cache: str) -> Toy:
    data = Toy(cache_dir=cache, max_val_blocks=8)
    data.prepare_data()
    data.setup("fit")
    return data


def module_of(dense: Path, output: Path, **kwargs) -> BlockSparsity:
    schedule = kwargs.pop("schedule", None) or LinearSchedule(**SCHEDULE)
    return BlockSparsity(str(dense), str(output), schedule=schedule, **{**SIZES, **kwargs})


def fit(module, cache, folder, patience=None, steps=3, ckpt=None, callbacks=(), data=None, **limits):
    warnings.simplefilter("ignore")
    schedule = TierSchedule(patience)
    checkpoint = ModelCheckpoint(folder / "ckpt", save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    trainer = L.Trainer(
        accelerator="cpu",
        **{"devices": 1, "max_epochs": -1, **limits},
        limit_train_batches=steps,
        num_sanity_val_steps=0,
        callbacks=[schedule, checkpoint, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data or Toy(cache_dir=cache, max_val_blocks=8), ckpt_path=ckpt)
    return schedule.summary()["tiers"]
