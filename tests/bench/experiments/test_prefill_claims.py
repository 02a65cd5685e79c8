"""Claims beside bounds: computed from a configuration alone."""

import json
import sys

import pytest

from bench.experiments import prefill_claims
from common.records import record


def test_another_model_s_bounds_need_its_configuration_alone(tmp_path, capsys, monkeypatch):
    prefill_claims.QWEN2_7B.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--keep", "0.9", "0.7", "--lengths", "4096"]
    monkeypatch.setattr(sys, "argv", ["prefill_claims", *options])
    prefill_claims.main()
    gentle, hard = map(json.loads, capsys.readouterr().out.splitlines())
    assert gentle["stages"] == [4, 7, 10, 13, 16, 19, 22, 25] and gentle["cap"] == 28 / 5
    assert (round(gentle["bound"], 2), round(hard["bound"], 2)) == (1.42, 2.43)  # deep stages stop at the tail's tenth
    assert gentle["mean_kept"] == pytest.approx(0.712, abs=1e-3)


def test_every_claim_is_recorded_beside_its_bound(tmp_path):
    prefill_claims.run(tmp_path / "records.jsonl", tmp_path)
    found = [entry["details"] for entry in record.read(tmp_path / "records.jsonl")[0]]
    assert [entry["claimed"] for entry in found] == [1.43, 1.96, 2.48, 12.2, 23.8, 35.0, 2.8, 39.7, 39.7]
    speed = {entry["claim"]: entry["flop_bound"] for entry in found}
    assert speed["SDTP, one GPU, keep 0.7, 4k tokens (×)"] == pytest.approx(2.46, abs=0.011)
    assert speed["E-RECAP, eight GPUs, keep 0.7, 32k tokens (×)"] == pytest.approx(2.71, abs=0.011)
    assert speed["the same, were every token dropped after layer 4 of 28 (×)"] == 28 / 5
