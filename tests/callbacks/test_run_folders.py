"""Where a run writes is settled before it works, is its alone, and its last checkpoint is found."""

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks import HFExport, RunFolders, RunRecord
from callbacks.run_folders import check_apart, to_continue
from common.files import replacing
from common.locks import InUseError
from common.manifest import DamagedError
from lightning_modules.pretraining import Pretraining
from lightning_modules.structured_pruning import LoraRecovery, StructuredPruning
from lightning_modules.token_pruning.module import TokenPruning
from lightning_modules.token_pruning.saliency import TokenSaliency
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.targets.gate_gradient import GateGradient
from strategies import CompressedFSDP2
from strategies.compressors.int8 import Int8
from tests.callbacks.test_callbacks import Net, Rows
from tests.common.writers import other_process


@pytest.fixture
def other_run(tmp_path):
    """Another process that has the folder of checkpoints."""
    with other_process(tmp_path / "checkpoints") as process:
        yield process


def _trainer(folder, callbacks, **options):
    warnings.simplefilter("ignore")
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 2, "devices": 1, "logger": False} | options,
    )


def _fit(folder, callbacks, ckpt_path=None, **options):
    run = _trainer(folder, callbacks, **options)
    run.fit(Net(), DataLoader(Rows(), batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    return run.global_step


def _checkpoints(folder):
    return ModelCheckpoint(f"{folder}/checkpoints", every_n_train_steps=1, save_last=True, save_top_k=0)


def _sharded(folder):
    callbacks = [RunFolders(), _checkpoints(folder)]
    try:
        return _fit(folder, callbacks, devices=2, strategy=CompressedFSDP2(compressor=Int8()))
    except InUseError as error:
        return str(error)


def test_a_second_run_is_told_of_the_first_on_all_ranks(two_ranks, other_run, tmp_path):
    for message in two_ranks.run(_sharded, str(tmp_path)):
        assert "checkpoints is being written by another run" in message and str(other_run.pid) in message
        assert "--my-run" in message
    assert not (tmp_path / "checkpoints").exists()
    other_run.communicate()
    assert two_ranks.run(_sharded, str(tmp_path)) == [2, 2]


class Breaks(L.Callback):
    def on_train_batch_end(self, *_):
        raise ZeroDivisionError


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_run_that_has_ended_holds_nothing(ends, tmp_path):
    callbacks = [RunFolders(), _checkpoints(tmp_path)]
    if ends == "well":
        _fit(tmp_path, callbacks)
    else:
        with pytest.raises(ZeroDivisionError):
            _fit(tmp_path, [*callbacks, Breaks()])
    code = "import sys; from common.locks import lock\nwith lock(sys.argv[1]): pass"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "checkpoints")], check=True)


def test_an_export_that_would_be_refused_is_refused_at_the_start(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.tex").write_text("ten years")
    trained = []

    class Counts(L.Callback):
        def on_train_start(self, *_):
            trained.append(1)

    with pytest.raises(ValueError, match=r"HFExport\.dirpath: .*model holds what Pare did not write \(thesis\.tex\)"):
        _fit(tmp_path, [HFExport(f"{tmp_path}/model"), Counts()])
    assert not trained
    HFExport(f"{tmp_path}/model", overwrite=True).check_arguments("fit", None, None)
    HFExport(f"{tmp_path}/model").check_arguments("validate", None, None)


def test_an_export_never_replaces_what_the_model_or_the_data_come_from(tmp_path):
    for folder in ("base", "text"):
        with replacing(tmp_path / folder, "model"):
            pass

    class Reads:
        def __init__(self, folder):
            self.folder = folder

        def inputs(self):
            return [self.folder]

    for model, data in ((Reads(tmp_path / "base"), None), (None, Reads(tmp_path / "base"))):
        for dirpath in (tmp_path / "base", tmp_path):
            with pytest.raises(ValueError, match="the input"):
                HFExport(str(dirpath), overwrite=True).check_arguments("fit", model, data)
        HFExport(f"{tmp_path}/text").check_arguments("fit", model, data)


@pytest.mark.parametrize(
    "make",
    [
        lambda given: Pretraining(pretrained=given),
        lambda given: StructuredPruning(given, "out"),
        lambda given: StructuredPruning("hub/base", "out", plan=given),
        lambda given: LoraRecovery(given),
        lambda given: LoraRecovery("hub/base", adapter=given),
        lambda given: LoraRecovery("hub/base", teacher=given),
        lambda given: TokenPruning(given, Schedule(layers=[2]), mse_weight=0, ranking_weight=0),
        lambda given: TokenPruning("hub/base", Schedule(layers=[2]), saliency=given),
        lambda given: TokenPruning("hub/base", Schedule(layers=[2]), pruner=given),
        lambda given: TokenSaliency(given, "out", Schedule(layers=[2]), GateGradient()),
    ],
)
def test_every_module_says_what_it_reads(make, tmp_path):
    with replacing(tmp_path / "read", "model"):
        pass
    model, target = make(str(tmp_path / "read")), HFExport(str(tmp_path / "read"), overwrite=True)
    with pytest.raises(ValueError, match=r"HFExport\.dirpath: .*read is the input"):
        target.check_arguments("fit", model, None)


def test_the_last_checkpoint_is_found_also_where_a_kill_moved_it_aside(tmp_path):
    callbacks = [HFExport(f"{tmp_path}/model"), ModelCheckpoint(tmp_path)]
    with pytest.raises(ValueError, match=r"ckpt_path: there is no last checkpoint in"):
        to_continue("last", callbacks)
    with pytest.raises(ValueError, match="no ModelCheckpoint has a dirpath"):
        to_continue("last", [])
    assert to_continue("auto", callbacks) is to_continue(None, callbacks) is None
    assert to_continue("some.ckpt", callbacks) == "some.ckpt"
    with replacing(tmp_path / "last.ckpt", "checkpoint"):
        pass
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    (tmp_path / ".last.partial.ckpt").mkdir()
    assert to_continue("last", callbacks) == str(tmp_path / "last.ckpt") and (tmp_path / "last.ckpt").is_dir()
    (tmp_path / "last-v1.ckpt").write_text("newer")
    os.utime(tmp_path / "last.ckpt", (1, 1))
    assert to_continue("last", callbacks) == to_continue("auto", callbacks) == str(tmp_path / "last-v1.ckpt")


def test_a_restart_takes_what_its_own_run_saved(tmp_path, monkeypatch):
    old, new, given = tmp_path / "last.ckpt", tmp_path / "last-v1.ckpt", [ModelCheckpoint(tmp_path)]
    old.write_text("of last week")
    os.utime(old, (1_000, 1_000))
    assert to_continue("auto", given) == str(old)
    monkeypatch.setenv("PARE_STARTED", "2000")
    assert to_continue("auto", given) is None
    for first, expected in (("base.ckpt", "base.ckpt"), ("last", str(old)), ("auto", str(old)), ("", None)):
        monkeypatch.setenv("PARE_CKPT_PATH", first)
        assert to_continue("auto", given) == expected
    assert to_continue("last", given) == str(old)
    new.write_text("of this run")
    assert to_continue("auto", given) == str(new)


@pytest.mark.parametrize(("dirpath", "output", "message"), [
    ("run", None, r"HFExport\.dirpath: .*run contains RunRecord\.path"),
    ("run/checkpoints", None, r"HFExport\.dirpath: .*checkpoints is ModelCheckpoint\.dirpath"),
    ("run/log", None, r"HFExport\.dirpath: .*log is CSVLogger\.save_dir"),
    ("run/model", "run", r"model\.output: .*run contains HFExport\.dirpath"),
    ("run/out/model", "run/out", r"model\.output: .*out contains HFExport\.dirpath"),
    ("run/model", "run/model", r"model\.output: .*model is HFExport\.dirpath"),
    ("run/checkpoints/model", "run/out", None),
])  # fmt: skip
def test_what_is_replaced_holds_nothing_else_of_the_run(dirpath, output, message, tmp_path):
    callbacks = [HFExport(f"{tmp_path}/{dirpath}", overwrite=True), RunRecord(f"{tmp_path}/run/results.jsonl")]
    callbacks += [ModelCheckpoint(f"{tmp_path}/run/checkpoints")]
    trainer = _trainer(tmp_path, callbacks, logger=CSVLogger(tmp_path, "run/log"))
    model = SimpleNamespace(output=output and f"{tmp_path}/{output}")
    check_apart(trainer, "validate", model)
    if message is None:
        check_apart(trainer, "fit", model)
    else:
        with pytest.raises(ValueError, match=message):
            check_apart(trainer, "fit", model)


def _unwritable(folder):
    try:
        _fit(
            folder, [RunFolders(), ModelCheckpoint(f"{folder}/file/checkpoints")], devices=2, strategy=CompressedFSDP2()
        )
    except OSError as error:
        return str(error)


def test_folders_that_cannot_be_made_are_an_error_on_all_ranks(two_ranks, tmp_path):
    (tmp_path / "file").write_text("")
    assert all("file" in message for message in two_ranks.run(_unwritable, str(tmp_path)))


def test_checkpoints_of_lightnings_own_strategies_are_sealed(tmp_path):
    path = tmp_path / "checkpoints/last.ckpt"
    assert _fit(tmp_path, [RunFolders(), _checkpoints(tmp_path)]) == 2
    assert _fit(tmp_path, [RunFolders(), _checkpoints(tmp_path)], ckpt_path=path, max_steps=3) == 3
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"last\.ckpt"):
        _fit(tmp_path, [RunFolders(), _checkpoints(tmp_path)], ckpt_path=path, max_steps=4)


class _Logs(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


class _Killed(ModelCheckpoint):
    """Ends the run when it has saved the third step, before Lightning logs it."""

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == 3:
            raise ZeroDivisionError


class _KilledBeforeValidation(ModelCheckpoint):
    """The last step's checkpoint is there, its row of the log and its validation are not."""

    def on_train_batch_end(self, trainer, *others):
        super().on_train_batch_end(trainer, *others)
        if trainer.global_step == 6:
            raise ZeroDivisionError


class _Validated(_Logs):
    def validation_step(self, batch, batch_idx):
        # another value in every batch, so that one that is left out shows
        self.log("val/loss", next(self.parameters()).sum() + batch["input_ids"].float().mean())


def test_a_run_killed_before_its_last_validation_has_it_when_resumed(tmp_path):
    def fit(folder, checkpoint, ckpt_path=None):
        logger = CSVLogger(folder, "log", flush_logs_every_n_steps=1)
        saved = checkpoint(folder / "checkpoints", every_n_train_steps=1, save_last=True, save_top_k=0)
        callbacks = [RunFolders(), RunRecord(str(folder / "results.jsonl"), "a"), saved]
        options = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
        run = _trainer(folder, callbacks, **options, logger=logger, limit_val_batches=4, num_sanity_val_steps=0)
        data = DataLoader(Rows(), batch_size=2)
        L.seed_everything(1)
        run.fit(_Validated(), data, data, ckpt_path=ckpt_path, weights_only=True)

    def left(folder):
        found = [row for log in sorted((folder / "log").glob("version_*/metrics.csv"))
                 for row in csv.DictReader(log.read_text().splitlines())]  # fmt: skip
        record = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
        losses = {int(row["step"]): row["train/loss"] for row in found if row["train/loss"]}
        return losses, {int(row["step"]): row["val/loss"] for row in found if row.get("val/loss")}, record["steps"]

    fit(tmp_path / "whole", ModelCheckpoint)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", _KilledBeforeValidation)
    fit(tmp_path / "killed", ModelCheckpoint, str(tmp_path / "killed/checkpoints/last.ckpt"))
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    assert list(left(tmp_path / "whole")[1]) == [2, 5]
    fit(tmp_path / "killed", ModelCheckpoint, str(tmp_path / "killed/checkpoints/last.ckpt"))  # and no third time
    assert len((tmp_path / "killed/results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("every, steps", [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5])])
def test_the_log_of_a_resumed_run_has_no_gap(every, steps, tmp_path):
    def rows():
        logs = sorted((tmp_path / "log").glob("version_*/metrics.csv"))
        found = [row for log in logs for row in csv.DictReader(log.read_text().splitlines())]
        return {int(row["step"]): row["train/loss"] for row in found if row["train/loss"]}

    options = {"max_steps": 6, "log_every_n_steps": every}

    def fit(checkpoint, ckpt_path=None):
        logger = CSVLogger(tmp_path, "log", flush_logs_every_n_steps=1)
        saved = checkpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True, save_top_k=0)
        run = _trainer(tmp_path, [RunFolders(), saved], **options, logger=logger)
        run.fit(_Logs(), DataLoader(Rows(), batch_size=2), ckpt_path=ckpt_path, weights_only=True)

    fit(ModelCheckpoint)
    whole = rows()
    assert list(whole) == steps
    shutil.rmtree(tmp_path / "log")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ZeroDivisionError):
        fit(_Killed)
    assert 2 not in rows()
    fit(ModelCheckpoint, str(tmp_path / "checkpoints/last.ckpt"))
    assert sorted(rows()) == steps and rows().get(2) == whole.get(2)
