"""Where a run's configuration is kept, and where it is not."""

import lightning.pytorch as L
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger

from callbacks.log_config import LogConfig

# Lightning's call of the parser
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def callback():
    parser = ArgumentParser()
    parser.add_argument("--a", type=int)
    return LogConfig(parser, parser.parse_args(["--a=1"]), overwrite=True)


def test_it_is_kept_beside_the_logs(callback, tmp_path):
    logger = CSVLogger(tmp_path, name="logs")
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=logger, enable_checkpointing=False, callbacks=[callback])
    callback.setup(trainer, L.LightningModule(), "fit")
    assert (tmp_path / "logs/version_0/config.yaml").read_text() == "a: 1\n"


def test_without_logs_a_file_of_the_users_own_stays_as_it_is(callback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("mine")
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[callback])
    callback.setup(trainer, L.LightningModule(), "fit")
    assert (tmp_path / "config.yaml").read_text() == "mine"
