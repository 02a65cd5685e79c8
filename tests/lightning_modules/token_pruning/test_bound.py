"""Bounds without weights."""

import json
import sys

import pytest
from transformers import Qwen2Config

from lightning_modules.token_pruning import bound
from lightning_modules.token_pruning.schedule import Schedule

QWEN2_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)


def test_the_published_schedule_on_qwen2_7b():
    found = list(bound.bounds(QWEN2_7B, Schedule(), [0.9, 0.7], [4096, 32768]))
    assert [(line["keep"], line["length"]) for line in found] == [(0.9, 4096), (0.9, 32768), (0.7, 4096), (0.7, 32768)]
    # 13.05 GFLOP per token of linear layers, computed by hand from the shapes
    assert [round(line["bound"], 2) for line in found] == [1.42, 1.52, 2.43, 2.68]
    assert found[0]["cap"] == 28 / 5 and all(1 < line["bound"] < line["cap"] for line in found)
    assert found[0]["mean_kept"] == pytest.approx(0.712, abs=1e-3)


def test_the_command_reads_a_configuration_alone(tmp_path, capsys, monkeypatch):
    QWEN2_7B.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--first", "1", "--step", "9", "--keep", "0.5", "--lengths", "1000"]
    monkeypatch.setattr(sys, "argv", ["bound", *arguments])
    bound.main()
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["stages"] == [1, 10, 19] and 1 < line["bound"] < line["cap"] == 14
