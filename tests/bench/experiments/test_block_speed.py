"""Speed of block sparsity: every matrix of a layer is pruned, and a product keeps its bound beside its speed."""

from types import SimpleNamespace

import torch

from bench.experiments import block_speed
from bench.report.evidence import sort
from bench.report.features import blocks
from common.records import record


def test_a_layer_has_its_seven_matrices(monkeypatch):
    updated = []

    def apply(weight, keep, moments):
        updated.append((tuple(weight.shape), len(moments.total)))

    update = SimpleNamespace(apply=apply)
    monkeypatch.setattr(block_speed, "Obs", lambda: update)
    monkeypatch.setattr(block_speed, "MEASURED_TOKENS", 4)
    found = block_speed.iteration(torch.device("cpu"), 32, 48, 8)
    attention, gates, down = ((32, 32), 32), ((48, 32), 32), ((32, 48), 48)
    assert updated == [attention] * 4 + [gates] * 2 + [down]
    assert found["layer_s"] == 2 * found["moments_s"] + found["demotion_s"] + found["update_s"]


def test_a_product_is_reported_with_its_bound(tmp_path):
    speed = {name: {"ratio": ratio, "spread": 0.1} for name, ratio in (("bands", 0.5), ("int8", 1.5))}
    product = {"rows": 1, "device": "cpu", "dense_ms": 2.0, "speed": speed, "bound": {"bands": 1.7, "int8": 2.0}}
    block_speed._append_products(tmp_path / "records.jsonl", product)
    evidence = sort(record.read(tmp_path / "records.jsonl")[0])
    assert [(one.what, one.key, one.value, one.bound) for one in blocks.FEATURE.speeds(evidence)] == [
        ("decode, batch 1: weights in the fastest packed form (bands), 41.7 % zeros", "packed", 0.5, 1.7),
    ]  # not the dense int8 product beside it
