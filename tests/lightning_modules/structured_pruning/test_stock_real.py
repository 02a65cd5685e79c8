"""On a real model with few key-value heads, the trials find that heads are worth more than the parameters they have."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from common.progress import stage
from lightning_modules.loading import load, load_tokenizer
from lightning_modules.structured_pruning.importance.activation import Activation
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.layout import Layout
from lightning_modules.structured_pruning.planner import Planner

REAL = Path(os.environ.get("PARE_REAL_MODEL") or Path(__file__).parents[4] / "real/smollm2")


@pytest.mark.skipif(not REAL.is_dir(), reason="no SmolLM2-135M folder: PARE_REAL_MODEL names one")
def test_trials_leave_smollm2_its_heads(tmp_path):
    model = load(REAL, "fast")
    text = load_tokenizer(REAL)("\n\n".join(topics[name] for name in sorted(topics)[:8])).input_ids
    rows = torch.tensor(text[: 4 * 128]).view(4, 128)
    layout = Layout(drop_by="block_influence", multiple=64)
    planner = Planner(model, "smollm2", [{"input_ids": rows, "labels": rows}], Activation(), layout, tmp_path, stage)
    target = round(0.25 * sum(shape_of(layer).parameters for layer in decoder_layers(model)))
    plan = planner.plan(target, {})
    assert len({(len(layer.groups), len(layer.channels)) for layer in plan.layers if not layer.dropped}) == 1
    assert all(len(layer.groups) == 3 for layer in plan.layers if not layer.dropped)
    assert {trial["groups"] for trial in plan.settings["trials"]} == {2, 3}
