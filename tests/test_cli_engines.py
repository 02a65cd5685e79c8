"""The other engines as a user types them: one argument on the command line, everything else unchanged.

Their ranks stay up between commands; `test_cli` has Lightning start them, and one that dies.
"""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.command_line import LONG, TINY, Commands, losses
from tests.test_cli import _parse

ENGINES = ["CompressedFSDP2", "CompressedDDP"]


@pytest.mark.parametrize("engine", [*ENGINES, "CompressedDiLoCo"])
def test_the_engine_is_one_argument(engine, capsys):
    code, out, err = _parse(capsys, "fit", *TINY, "--trainer.strategy.class_path", engine, "--print_config")
    assert code == 0, err
    strategy = yaml.safe_load(out)["trainer"]["strategy"]
    assert strategy["class_path"].endswith(engine)
    assert strategy["init_args"]["compressor"]["class_path"].endswith("NoCompression")  # kept from the configuration


@pytest.fixture(scope="module")
def commands():
    ranks = Commands()
    yield ranks
    ranks.close()


def _switched(engine: str) -> list[str]:
    return ["--trainer.strategy.class_path", engine, *LONG]


@pytest.fixture(scope="module", params=ENGINES)
def trained(request, tmp_path_factory, commands) -> tuple[str, Path]:
    """One run to the end with an engine: accumulation 2, dropout on, a Hugging Face folder exported."""
    folder = tmp_path_factory.mktemp(request.param)
    export = ["--trainer.callbacks+=HFExport", "--trainer.callbacks.dirpath", "runs/model"]
    (folder / "output.txt").write_text(commands.run(folder, "fit", *_switched(request.param), *export))
    return request.param, folder


def test_fit_records_what_the_engine_did(trained):
    engine, folder = trained
    fields = json.loads((folder / "runs/results.jsonl").read_text())
    assert fields["strategy"] == engine and fields["compress_method"] == "int8" and fields["steps"] == 12
    assert 0 < fields["grad_rel_error"] < 0.02
    if engine == "CompressedDDP":  # the averaged shards travel in fp32: 2·4 bytes against 1 + 4
        assert 1.5 < fields["compression_ratio"] < 1.6 and fields["bytes_parameters_total"] == 0
    else:
        assert 3.5 < fields["compression_ratio"] < 4 and fields["bytes_parameters_total"] > 0
    output = (folder / "output.txt").read_text()
    assert "Warning" not in output and "runs/model" in output


def test_traffic_table_has_a_row_per_unit_and_step(trained):
    engine, folder = trained
    with open(next(folder.glob("runs/gpt2_tiny/version_0/traffic.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    blocks = {"root", "model.transformer.h.0", "model.transformer.h.1"}
    units = {"bucket 0"} if engine == "CompressedDDP" else blocks
    assert {row["unit"] for row in rows} == units and len(rows) == len(units) * 12


def _val_loss(output: str) -> float:
    return float(re.search(r"val/loss\W+([\d.]+)", output)[1])


def test_checkpoint_and_export_score_as_recorded(trained, commands):
    engine, folder = trained
    recorded = json.loads((folder / "runs/results.jsonl").read_text())["val_loss"]
    last = ["--ckpt_path", "runs/gpt2_tiny/checkpoints/last.ckpt"]
    exported = ["--model.pretrained", "runs/model"]
    for of in (last, exported):
        said = commands.run(folder, "validate", *_switched(engine), *of)
        assert _val_loss(said) == pytest.approx(recorded, rel=1e-5)


def test_interrupted_run_resumes_bit_for_bit(trained, tmp_path, commands):
    engine, folder = trained
    commands.interrupt(tmp_path, *_switched(engine))
    commands.run(tmp_path, "fit", *_switched(engine), "--ckpt_path", "last")
    assert losses(tmp_path) == losses(folder)


def test_parameters_are_compressed_by_one_argument(tmp_path, commands):
    coded = ["--trainer.strategy.parameter_compressor", "Int8", "--trainer.max_steps", "7"]
    commands.run(tmp_path, "fit", *_switched("CompressedFSDP2"), *coded)
    fields = json.loads((tmp_path / "runs/results.jsonl").read_text())
    assert fields["parameter_compress_method"] == "int8"
    # 2 micro-batches, each gathering blocks twice and the root once, at 1 + 4/256 bytes an element and padding
    assert fields["bytes_parameters_by_role"]["parameters.values"] > 0
    assert fields["bytes_parameters_total"] == sum(fields["bytes_parameters_by_role"].values())


LOCAL = [
    *("--trainer.strategy.sync_every", "4", "--trainer.strategy.compressor", "Bidirectional"),
    *("--trainer.strategy.compressor.inner", "ErrorFeedback", "--trainer.strategy.compressor.inner.inner", "Int4"),
    *("--trainer.strategy.num_fragments", "2", "--trainer.strategy.fragment_sync_delay", "1"),
]


def test_local_steps_are_recorded_and_resume_bit_for_bit_in_the_middle_of_a_round(tmp_path, commands):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    commands.run(whole, "fit", *_switched("CompressedDiLoCo"), *LOCAL)
    commands.interrupt(stopped, *_switched("CompressedDiLoCo"), *LOCAL)
    commands.run(stopped, "fit", *_switched("CompressedDiLoCo"), *LOCAL, "--ckpt_path", "last")
    assert losses(stopped) == losses(whole)
    fields, again = (json.loads((folder / "runs/results.jsonl").read_text()) for folder in (whole, stopped))
    assert fields["strategy"] == "CompressedDiLoCo" and fields["local_steps"]["every"] == 4
    assert fields["compression_ratio"] > 12 and fields["val_loss"] == again["val_loss"]
