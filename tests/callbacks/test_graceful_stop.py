"""Signals at any time, under every strategy: what is kept, who hears of it, and the exit status."""

import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed import TCPStore
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from callbacks import GracefulStop, graceful_stop
from callbacks.graceful_stop import SIGNALS, Stopped, stoppable
from strategies.compressors.int8 import Int8
from tests.ranks import FORKED
from tests.strategies.engines import ENGINES


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.full((8,), index / 32)


class Net(L.LightningModule):
    """Sends a signal to its own process in one step of one loop, on one rank."""

    def __init__(self, where: str = "", at: int = 0, rank: int = 0, signum: int = signal.SIGTERM):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.where, self.at, self.rank, self.signum = nn.Linear(8, 4), where, at, rank, signum
        self.mean, self.seen, self.means = MeanMetric(), [], []

    def _step(self, batch, where, index):
        self.seen.append(where)
        if (where, index) == (self.where, self.at) and self.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)
        return self.net(batch).pow(2).mean()

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        return self._step(batch.new_full((2, 8), step / 8), "train", step)  # the loader does not resume

    def validation_step(self, batch, batch_idx):
        where = "sanity" if self.trainer.sanity_checking else "validate"
        self.mean.update(self._step(batch, where, 100 * self.trainer.global_step + batch_idx))

    def on_validation_epoch_end(self):
        self.means.append(self.mean.compute().item())
        self.mean.reset()

    def test_step(self, batch, batch_idx):
        self._step(batch, "test", batch_idx)

    def predict_step(self, batch, batch_idx):
        self._step(batch, "predict", batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def _trainer(folder, **options):
    warnings.simplefilter("ignore")
    return L.Trainer(
        accelerator="cpu",
        max_steps=8,
        callbacks=[GracefulStop(), ModelCheckpoint(f"{folder}/checkpoints", save_last=True, every_n_train_steps=100)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        **{"devices": 1, "num_sanity_val_steps": 0, **options},
    )


def _loaders():
    return DataLoader(Rows(), batch_size=2), DataLoader(Rows(), batch_size=8)


def _fit(module, folder, ckpt_path=None, **options):
    trainer = _trainer(folder, **options)
    with stoppable():
        trainer.fit(module, *_loaders(), ckpt_path=ckpt_path)
    return trainer


def _weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Net:
    module = Net()
    _fit(module, tmp_path_factory.mktemp("whole"))
    return module


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    assert {signum: signal.getsignal(signum) for signum in SIGNALS} == before  # Python users keep theirs


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(("where", "at", "steps"), [("train", 2, 3), ("validate", 402, 4), ("validate", 403, 4)])
def test_one_device_saves_where_it_was_and_goes_on_from_there(where, at, steps, signum, whole, tmp_path, capsys):
    module = Net(where, at, signum=signum)
    with pytest.raises(Stopped) as stop:
        _fit(module, tmp_path)
    assert stop.value.code == 128 + signum and module.seen.count("train") == steps
    last = tmp_path / "checkpoints/last.ckpt"
    assert f"after step {steps}; continue with --ckpt_path {last}" in capsys.readouterr().err
    again = Net()
    _fit(again, tmp_path, ckpt_path=last)
    assert torch.equal(_weights(again), _weights(whole))
    # a validation that was broken off is done again, as a whole
    assert [*module.means, *again.means] == whole.means


def test_a_stop_in_the_last_validation_keeps_what_was_trained(whole, tmp_path, capsys):
    module = Net("validate", 801)
    with pytest.raises(Stopped):
        _fit(module, tmp_path)
    assert module.means == whole.means[:1]
    last = tmp_path / "checkpoints/last.ckpt"
    assert f"training was complete: validate with --ckpt_path {last}" in capsys.readouterr().err
    again = Net()
    _trainer(tmp_path).validate(again, _loaders()[1], ckpt_path=last)
    assert again.means == whole.means[1:]


@pytest.mark.parametrize("where", ["sanity", "validate", "test", "predict"])
@pytest.mark.parametrize("signum", SIGNALS)
def test_where_nothing_is_trained_a_signal_ends_the_command_at_once(where, signum, tmp_path, capfd):
    module = Net(where, 1, signum=signum)
    trainer = _trainer(tmp_path, num_sanity_val_steps=4)
    with pytest.raises(Stopped) as stop, stoppable():
        getattr(trainer, "fit" if where == "sanity" else where)(
            module, _loaders()[1], *[_loaders()[1]] * (where == "sanity")
        )
    assert stop.value.code == 128 + signum
    assert module.seen == [where] * 2 and not (tmp_path / "checkpoints").exists()
    assert f"stopped by {signal.Signals(signum).name}" in capfd.readouterr().err


class _DiedError(Exception): ...


def _die(signum):
    raise _DiedError(signum)


def test_a_second_signal_ends_a_run_that_does_not_get_to_its_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(graceful_stop, "_die", _die)
    module = Net("train", 2)
    again = lambda _: os.kill(os.getpid(), signal.SIGINT) if len(module.seen) == 3 else None  # noqa: E731
    module.on_before_optimizer_step = again
    with pytest.raises(_DiedError):
        _fit(module, tmp_path)


def test_a_second_signal_ends_what_is_slow_to_clean_up(monkeypatch):
    monkeypatch.setattr(graceful_stop, "_die", _die)
    with pytest.raises(_DiedError), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_host_stays_as_near_to_the_device_as_the_announcement_needs(monkeypatch):
    made, waited = [], []

    class Event:
        def record(self):
            self.step = len(made) + 1
            made.append(self)

        def synchronize(self):
            waited.append(self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(graceful_stop.dist, "is_initialized", lambda: True)
    callback = GracefulStop()
    for kind in ("cpu", *["cuda"] * 5):
        callback._stay_near(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind))))
    assert len(made) == 5 and waited == [1, 2, 3]  # of 5 steps the last two may be unfinished
    # another rank announces after a step whose work is launched: it cannot be more than so many steps behind
    assert graceful_stop._LEAD["cuda"] > len(made) - waited[-1]


def test_workers_of_a_loader_leave_ctrl_c_to_their_parent():
    with stoppable():
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_launched_rank_passes_the_signal_to_its_parent_and_leaves_the_status_to_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PARE_PARENT", str(os.getppid()))
    told = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, signum: told.append((pid, signum)))
    with pytest.raises(Stopped) as stop, stoppable():
        kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 0 and told == [(os.getppid(), signal.SIGRTMIN + signal.SIGTERM)]


def test_what_a_launched_rank_passes_on_stops_once():
    with pytest.raises(Stopped) as stop, stoppable():
        try:
            os.kill(os.getpid(), signal.SIGRTMIN + signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGRTMIN + signal.SIGINT)  # its answer to the signal that it is sent
    assert stop.value.code == 130


def _on_ranks(folder, engine, where, at):
    module = Net(where, at, rank=1)
    try:
        _fit(module, folder, devices=2, strategy=ENGINES[engine](compressor=Int8()))
    except Stopped as stop:
        module.seen.append(stop.code)
    last = Path(folder, "checkpoints/last.ckpt")
    again = Net()
    trainer = _fit(again, folder, last, devices=2, strategy=ENGINES[engine](compressor=Int8()))
    return module.seen.count("train"), module.seen[-1], trainer.global_step, [*module.means, *again.means]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("where", "at"), [("train", 2), ("validate", 400), ("validate", 401)])
def test_a_signal_to_one_rank_stops_all_at_one_step(engine, where, at, two_ranks, tmp_path):
    (steps, code, end, means), other = two_ranks.run(_on_ranks, str(tmp_path), engine, where, at)
    assert (steps, code, end, means) == other
    assert code == 128 + signal.SIGTERM and end == 8 and len(means) == 2
    assert steps == 4


def _deaf(what, folder):
    """In a process of its own: wait where no signal is heard, or for a child that one is meant for."""
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    graceful_stop._DEAF_S = 1.0
    with stoppable():
        if what == "meeting":
            (folder / "waiting").touch()
            TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=True)
        else:
            child = os.fork()
            if child == 0:
                time.sleep(60)
            time.sleep(0.5)
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            time.sleep(2.0)


def _start(what, folder):
    process = FORKED.Process(target=_deaf, args=(what, folder))
    process.start()
    return process


def _end(process, folder):
    """Exit status, and what it said."""
    process.join(60)
    return process.exitcode, (folder / "said").read_text()


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_process_that_waits_in_torch_for_other_ranks_can_be_stopped(signum, tmp_path):
    process = _start("meeting", tmp_path)
    while process.is_alive() and not (tmp_path / "waiting").exists():
        time.sleep(0.05)
    time.sleep(1.0)  # until it is there
    os.kill(process.pid, signum)
    status, said = _end(process, tmp_path)
    assert status == 128 + signum and "could not be heard" in said


def test_a_signal_to_a_forked_child_does_not_end_its_parent(tmp_path):
    status, said = _end(_start("child", tmp_path), tmp_path)
    assert status == 0, said
