"""The command line as a user types it.

Commands that only parse run in this process, and one training in its own: what goes on from it runs on ranks that are
up already, as most of a small command is starting Python.
"""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from unittest import mock

import lightning.pytorch
import psutil
import pytest
import yaml

from tests.command_line import LONG, REPRODUCIBLE, TINY, Commands, losses
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))
import main
from common.variants import families, variants
from lightning_modules import EmbeddedDocs, Pretraining
from strategies.compressors import Compressor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse by an old name

# Configurations of main.py, each with the arguments that its header names.
COMMANDS = {
    path: shlex.split(command[1])
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if (command := re.search(r"# run: .*?main\.py (.*)", path.read_text()))
}


def _parse(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command that only parses."""
    with mock.patch.object(sys, "argv", ["main.py", *arguments]), pytest.raises(SystemExit) as stop:
        main.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_every_configuration_is_accepted(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = _parse(capsys, *COMMANDS[path], "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["class_path"].startswith("lightning_modules.")


def test_a_compressor_is_one_short_argument(capsys):
    code, out, _ = _parse(capsys, "fit", *TINY, "--trainer.strategy.compressor", "BF16", "--print_config")
    assert code == 0
    compressor = yaml.safe_load(out)["trainer"]["strategy"]["init_args"]["compressor"]
    assert compressor["class_path"].endswith("BF16")


def test_compressors_nest_by_their_short_names(capsys):
    key = "--trainer.strategy.compressor"
    nested = [f"{key}", "ErrorFeedback", f"{key}.inner", "TopK", f"{key}.inner.density", "0.02"]
    nested += [f"{key}.inner.values", "Int8", f"{key}.inner.values.block_size", "64"]
    code, out, err = _parse(capsys, "fit", *TINY, *nested, "--print_config")
    assert code == 0, err
    wrapper = yaml.safe_load(out)["trainer"]["strategy"]["init_args"]["compressor"]
    inner = wrapper["init_args"]["inner"]
    assert wrapper["class_path"].endswith("ErrorFeedback") and inner["init_args"]["density"] == 0.02
    assert inner["init_args"]["values"]["init_args"]["block_size"] == 64


STRATEGY = "--trainer.strategy.compressor"
MISSPELT = {
    "Compressor": (*TINY, STRATEGY, "Int9"),
    "Scorer": ("--config", "configs/token_pruning/quality.yaml", "--model.scorers", "[KeyNorn]"),
    "Peer": ("--config", "configs/token_pruning/answers.yaml", "--model.peers", "[SnapKW]"),
    "Target": ("--config", "configs/token_pruning/train.yaml", "--model.target", "GateGrad"),
    "Importance": ("--config", "configs/structured_pruning/prune.yaml", "--model.importance", "Tailor"),
    "Allocation": ("--config", "configs/structured_pruning/prune.yaml", "--model.allocation", "Unifrom"),
    "Score": ("--config", "configs/block_sparsity/oneshot.yaml", "--model.score", "Wand"),
    "Schedule": ("--config", "configs/block_sparsity/progressive.yaml", "--model.schedule", "Cubic"),
    "Callback": (*TINY, "--trainer.callbacks+=Thruput"),
    "LightningModule": (*TINY, "--model", "Pretrain"),
    "LightningDataModule": (*TINY, "--data", "TextCorpse"),
}


@pytest.mark.parametrize("family", MISSPELT)
def test_a_misspelt_class_lists_its_family_in_one_line(family, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, err = _parse(capsys, "fit", *MISSPELT[family])
    known = {cls.__name__: cls for cls in (Compressor, *families())}
    base = known.get(family) or getattr(lightning.pytorch, family)
    error, help_, *rest = err.strip().splitlines()
    assert code == 2 and not rest and help_ == "help: main.py fit --help"
    assert re.match(rf"error: [\w.]+: there is no {family} {MISSPELT[family][-1].strip('[]').split('=')[-1]}\b", error)
    assert {cls.__name__ for cls in variants(base) if cls.__module__.startswith(PARE)} <= set(re.findall(r"\w+", error))


PARE = ("lightning_modules.", "strategies.", "callbacks.")


def test_a_class_inside_a_class_is_named_by_its_whole_key(capsys):
    code, _, err = _parse(capsys, "fit", *TINY, STRATEGY, "ErrorFeedback", f"{STRATEGY}.inner", "Topk")
    assert code == 2 and err.startswith(
        "error: trainer.strategy.compressor.inner: there is no Compressor Topk; did you"
    )
    assert "did you mean TopK?" in err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--trainer.strategy.compressor", "Int8", "--trainer.strategy.compressor.block_sise", "3"], "block_sise"),
        (["--trainer.strategy.sharding_strategy", "HYBRID_SHARD"], "sharding_strategy"),
        (["--data.block_size", "many"], "block_size"),
        (["--trainer.callbacks", "[Thruput]"], "Thruput"),
    ],
)
def test_what_is_wrong_is_named(arguments, names, capsys):
    code, _, err = _parse(capsys, "fit", *TINY, *arguments)
    assert code == 2 and names in err and len(err.splitlines()) <= 3


def test_what_a_class_refuses_is_an_error_of_the_command_line(capsys):
    code, _, err = _parse(capsys, "fit", *TINY, "--model.learning_rate", "-1")
    assert code == 2 and err.startswith("error: ") and "learning_rate must be positive, got -1" in err


def _check(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and what was said."""
    with mock.patch.object(sys, "argv", ["main.py", "check", *arguments]):
        try:
            main.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_check_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EmbeddedDocs, "prepare_data", lambda self: pytest.fail("prepared"))
    mine = tmp_path / "mine.yaml"
    mine.write_text(Path(TINY[1]).read_text())
    code, said = _check(capsys, "--config", "mine.yaml", *TINY[2:])
    assert code == 0 and "fit: nothing is wrong" in said and list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model.learning_rate", "0"], "learning_rate"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--command", "prune"], "Pretraining has nothing to prune"),
        (["--command", "prone"], "prune"),
        (
            ["--trainer.strategy.class_path=CompressedFSDP2", "--trainer.strategy.replicas=2", "--trainer.devices=3"],
            "replicas=2",
        ),
    ],
)
def test_check_names_what_is_wrong(arguments, names, capsys):
    code, said = _check(capsys, *TINY, *arguments)
    assert code == 2 and names in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "arguments", "names"),
    [
        ("fit", ["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        ("validate", ["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        ("prune", [], "Pretraining has nothing to prune"),
        ("fit", ["--trainer.strategy=CompressedFSDP2", "--trainer.strategy.replicas=2"], "replicas=2"),
    ],
)
def test_a_command_refuses_the_same_before_any_work(command, arguments, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EmbeddedDocs, "prepare_data", lambda self: pytest.fail("text was read"))
    monkeypatch.setattr(sys, "argv", ["main.py", command, *TINY, *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2 and names in capsys.readouterr().err


def test_check_asks_module_and_data(capsys, monkeypatch):
    asked = []
    for cls in (Pretraining, EmbeddedDocs):
        monkeypatch.setattr(cls, "check_arguments", lambda self, *given: asked.append((self, *given)), raising=False)
    assert _check(capsys, *TINY, "--command", "validate")[0] == 0
    (data, *told), (model, *also) = asked
    assert isinstance(data, EmbeddedDocs) and isinstance(model, Pretraining)
    assert told == also == ["validate", data]


def test_a_last_checkpoint_that_is_not_there_is_an_error_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", *TINY, "--ckpt_path", "last"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code and "there is no last checkpoint in" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def _start(folder: Path, *arguments: str, command: str = "fit", **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), command, *TINY, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **REPRODUCIBLE, "CI": "true", "HF_HUB_OFFLINE": "1", **variables},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One run to the end: accumulation 2, dropout on, a Hugging Face folder exported."""
    folder = tmp_path_factory.mktemp("trained")
    process = _start(folder, *LONG, "--trainer.callbacks+=HFExport", "--trainer.callbacks.dirpath", "runs/model")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    ranks = Commands()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Commands]:
    process = Commands(1)
    yield process
    process.close()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "prune", "verify", "export"])
def test_a_module_may_refuse_before_any_data_is_prepared(command, monkeypatch, capsys):
    told = []

    def refuse(module, command, datamodule):
        told.append((command, datamodule.name))
        raise ValueError("budget: too much")

    monkeypatch.setattr(Pretraining, "check_arguments", refuse, raising=False)
    monkeypatch.setattr(Pretraining, command, None, raising=False)  # it has no `prune` of its own
    monkeypatch.setattr(EmbeddedDocs, "prepare_data", lambda self: told.append("prepared"))
    monkeypatch.setattr(sys, "argv", ["main.py", command, *TINY])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2 and "error: budget: too much" in capsys.readouterr().err
    assert told == [(command, "embedded")]


def test_fit_leaves_a_record_with_every_required_field(trained):
    line = (trained / "runs/results.jsonl").read_text()
    fields = json.loads(line)
    assert fields["compress_method"] == "int8" and fields["world_size"] == 2 and fields["steps"] == 12
    assert fields["steps_measured"] == 7
    assert fields["val_ppl"] == pytest.approx(2.718281828 ** fields["val_loss"], rel=1e-4)
    assert 3.5 < fields["compression_ratio"] < 4
    assert fields["comm_time_ms_by_op"].keys() == {"all_gather", "all_to_all"}
    assert 0 < fields["grad_rel_error"] < 0.02 and fields["grad_cos_sim"] > 0.999
    assert fields["nan_steps"] == 0
    assert yaml.safe_load(fields["config"])["seed_everything"] == 1234


def test_fit_ends_with_a_table_and_stays_quiet_in_ci(trained):
    output = (trained / "output.txt").read_text()
    assert "validation perplexity" in output and "runs/model" in output
    assert "Warning" not in output and "seamless" not in output and "s/step" not in output


def test_traffic_table_has_a_row_per_unit_and_step(trained):
    with open(next(trained.glob("runs/gpt2_tiny/version_0/traffic.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["unit"] for row in rows} == {"root", "model.transformer.h.0", "model.transformer.h.1"}
    assert len(rows) == 3 * 12
    assert all(int(row["sent_bytes"]) * 3.5 < int(row["ideal_bytes"]) for row in rows)


def test_exported_model_loads_and_scores_as_recorded(trained, alone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained / "runs/model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "runs/model")
    assert len(tokenizer) <= model.config.vocab_size
    assert "int8" in (trained / "runs/model/README.md").read_text()
    output = alone.run(trained, "validate", "--model.pretrained", "runs/model", "--trainer.devices", "1")
    recorded = json.loads((trained / "runs/results.jsonl").read_text())["val_loss"]
    printed = float(re.search(r"val/loss\W+([\d.]+)", output)[1])
    assert printed == pytest.approx(recorded, rel=1e-5)  # one rank, other batches, same tokens


def test_generate_streams_a_continuation(trained, alone):
    options = ["--model_dir", "runs/model", "--prompt", "The", "--max_new_tokens", "5", "--temperature", "0"]
    assert len(alone.run(trained, "generate", *options)) > 5  # of a model that has learned little more than spaces


def _after_steps(folder: Path, steps: int, *arguments: str) -> subprocess.Popen:
    """A run that has logged so many steps and goes on."""
    process = _start(folder, *arguments)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(losses(folder)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def test_interrupted_run_resumes_bit_for_bit(trained, tmp_path, commands):
    commands.interrupt(tmp_path, *LONG)
    commands.run(tmp_path, "fit", *LONG, "--ckpt_path", "last")
    assert losses(tmp_path) == losses(trained)


def test_checkpoint_of_another_model_is_refused(trained, commands):
    last = str(trained / "runs/gpt2_tiny/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="does not fit this model"):
        commands.run(trained, "fit", "--model.config", "{n_layer: 2, n_embd: 64, n_head: 2}", "--ckpt_path", last)


def test_killed_rank_ends_the_run_with_a_message(tmp_path):
    process = _after_steps(tmp_path, 3, "--trainer.max_steps", "100000")
    child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(child), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another rank has died" in output or "terminated with code" in output


SLOW = """
import time
from pathlib import Path
from lightning.pytorch import Callback
class Slow(Callback):
    def on_validation_batch_start(self, *_):
        Path("validating").touch()
        time.sleep(1)
"""


@pytest.mark.parametrize("child", [False, True], ids=["rank 0", "rank 1"])
def test_a_signal_to_either_rank_ends_a_validation_of_both(child, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    slow = ["--trainer.callbacks+=slow.Slow", "--data.max_val_blocks", "200"]
    process = _start(tmp_path, *slow, command="validate", PYTHONPATH=f"{ROOT}:{tmp_path}")
    ranks = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while process.poll() is None and not (tmp_path / "validating").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = ranks.children()
    os.kill(children[0].pid if child else process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM" in output and "Traceback" not in output
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_the_console_command_works_from_any_folder(tmp_path):
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name, _, place = settings["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert name == "pare" and "main" in settings["options"]["py_modules"].split()
    module, _, function = place.partition(":")
    script = tmp_path / "bin/pare"  # as pip writes it
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    done = subprocess.run(
        [sys.executable, str(script), "fit", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python main.py fit"), done.stderr
