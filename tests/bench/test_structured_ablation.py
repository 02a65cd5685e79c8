"""The ablation's cells are what pruning by the same plan gives, leave the dense model alone, and end in figures."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench.experiments import structured_ablation as ablation
from common.progress import stage
from common.variants import variants
from lightning_modules.perplexity import mean_nll, perplexity
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.importance import Importance
from lightning_modules.structured_pruning.importance.magnitude import Magnitude
from lightning_modules.structured_pruning.importance.per_tensor_truncation import PerTensorTruncation
from lightning_modules.structured_pruning.importance.random import Random
from lightning_modules.structured_pruning.layout import Layout
from lightning_modules.structured_pruning.planner import Planner
from lightning_modules.structured_pruning.verify import removed_parts_zeroed
from tests.lightning_modules.structured_pruning import toy


def test_a_cell_is_the_perplexity_of_the_zeroed_model(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RECOVERY_STEPS", 3)
    model, text = toy.tiny(), toy.batches()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    data = SimpleNamespace(block_size=20, calibration=lambda count, seed: text, val_dataloader=lambda: text)
    arguments = ([Magnitude(), PerTensorTruncation()], [Uniform()], [0.25, 0.5], tmp_path)
    cells = list(ablation.cells(model, "toy", data, *arguments))

    assert [(c["importance"], c["budget"]) for c in cells] == [
        ("Magnitude", 0.25),
        ("Magnitude", 0.5),
        ("PerTensorTruncation", 0.25),
        ("PerTensorTruncation", 0.5),
    ]
    planner = Planner(model, "toy", text, Magnitude(), Layout("free", Uniform(), multiple=1), tmp_path, stage)
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    with removed_parts_zeroed(model, planner.plan(round(0.25 * decoder), {})):
        wanted = perplexity(mean_nll(model, text))
    assert cells[0]["ppl"] == pytest.approx(wanted, rel=0.02)  # budgets are met up to a channel
    assert all(cell["ppl_recovered"] < cell["ppl"] for cell in cells)  # trained on the text it is evaluated on
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_process_measures_every_variant_and_each_cell_becomes_figures(tmp_path, monkeypatch):
    """The process is stood in for; what it is asked, and what is made of its lines, is real."""
    asked, appended = [], []

    def lines(module, *arguments, log):
        asked.append((module, arguments[arguments.index("--seed") + 1]))
        yield {"dense": 10.0, "seed": 1}
        names = ([cls.__name__ for cls in variants(base)] for base in (Importance, Allocation))
        for importance, allocation, budget in itertools.product(*names, ablation.BUDGETS):
            cell = {"importance": importance, "allocation": allocation, "budget": budget}
            yield cell | {"ppl": 12.0 + len(asked), "ppl_recovered": 11.0}

    monkeypatch.setattr(ablation, "json_lines", lines)
    monkeypatch.setattr(ablation.figures, "append", lambda records, **figure: appended.append(figure))
    for _ in range(2):  # the second time every seed is there already
        ablation.run(tmp_path / "records.jsonl", tmp_path / "work", tmp_path / "model")
    assert asked == [("bench.experiments.structured_ablation", str(seed)) for seed in ablation.SEEDS]
    (tmp_path / "model").write_text("another one")
    with pytest.raises(ValueError, match=r"another state \(inputs\)"):
        ablation.run(tmp_path / "records.jsonl", tmp_path / "work", tmp_path / "model")
    cells = len(variants(Importance)) * len(variants(Allocation)) * len(ablation.BUDGETS)
    assert len(appended) == 2 * (2 * cells + 3 * len(ablation.BUDGETS))
    assert appended[0]["value"] == pytest.approx(14.0) and appended[0]["spread"] == pytest.approx(1.0)
    json.dumps(appended, allow_nan=False)


def test_every_variant_is_measured_and_the_seed_reaches_those_that_draw():
    assert ablation.seeded(Random, 7).config() == {"seed": 7} and ablation.seeded(Magnitude, 7).config() == {}
