"""The ablation's cells are what pruning by the same plan gives, and leave the dense model alone."""

from types import SimpleNamespace

import pytest
import torch

from common.progress import stage
from lightning_modules.structured_pruning import ablation
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.evaluation import first_blocks, ppl
from lightning_modules.structured_pruning.importance.magnitude import Magnitude
from lightning_modules.structured_pruning.importance.per_tensor_truncation import PerTensorTruncation
from lightning_modules.structured_pruning.prune import Pruner
from lightning_modules.structured_pruning.verify import removed_parts_zeroed
from tests.lightning_modules.structured_pruning import toy


def test_a_cell_is_the_perplexity_of_the_zeroed_model(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "_CALIBRATION_BLOCKS", 4)
    model, text = toy.tiny(), toy.batches()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    data = SimpleNamespace(block_size=20, train_dataloader=lambda: text, val_dataloader=lambda: text)
    arguments = ([Magnitude(), PerTensorTruncation()], [Uniform()], [0.25, 0.5], 3, tmp_path)
    cells = list(ablation.cells(model, "toy", data, *arguments))

    assert [(c["importance"], c["budget"]) for c in cells] == [
        ("Magnitude", 0.25),
        ("Magnitude", 0.5),
        ("PerTensorTruncation", 0.25),
        ("PerTensorTruncation", 0.5),
    ]
    pruner = Pruner(model, "toy", first_blocks(text, 4), Magnitude(), Uniform(), 1, 0, tmp_path, stage)
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    with removed_parts_zeroed(model, pruner.plan(round(0.25 * decoder), {})):
        assert cells[0]["ppl"] == pytest.approx(ppl(model, text), rel=0.02)  # budgets are met up to a channel
    assert all(cell["ppl_recovered"] < cell["ppl"] for cell in cells)  # trained on the text it is evaluated on
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
