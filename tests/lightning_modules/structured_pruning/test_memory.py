"""Peaks by arithmetic against what torch really allocates, on a small model."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from common.measure.memory import peak_bytes
from common.progress import stage
from lightning_modules.loading import load
from lightning_modules.perplexity import mean_nll
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.compensation.reconstruction import Reconstruction
from lightning_modules.structured_pruning.compensation.unchanged import Unchanged
from lightning_modules.structured_pruning.importance.activation import Activation
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.structured_pruning.importance.magnitude import Magnitude
from lightning_modules.structured_pruning.importance.refitted import Refitted
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.layout import Layout
from lightning_modules.structured_pruning.memory import Workload, peaks
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.planner import Planner
from lightning_modules.structured_pruning.refitting import refit
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.trials import Candidate
from lightning_modules.structured_pruning.verify import proven_slice
from tests.lightning_modules.structured_pruning.toy import plan_for, tiny

CPU = torch.device("cpu")
KEPT = [LayerPlan([0, 1], list(range(320)))] * 3
ROWS, TOKENS, BATCHES = 4, 64, 3


def _model(dtype: torch.dtype, vocabulary: int) -> Any:
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}
    return tiny(dtype=dtype, tie_word_embeddings=True, **sizes, **heads)


def _text() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 500, (ROWS, TOKENS), generator=draw) for _ in range(BATCHES)]
    return [{"input_ids": one, "labels": one} for one in rows]


def _work(model: Any, dtype: torch.dtype, verify_tokens: int) -> Workload:
    tokens = ROWS * TOKENS
    sizes = (model.config.hidden_size, model.config.vocab_size)
    return Workload(ModelShape.of(model, dtype.itemsize), *sizes, tokens, BATCHES * tokens, verify_tokens)


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 500), (torch.bfloat16, 4000)])
def test_every_step_takes_what_arithmetic_says(dtype, vocabulary, tmp_path):
    model, text = _model(dtype, vocabulary), _text()
    plan, ids = plan_for(model, KEPT), text[0]["input_ids"][:2]
    work = _work(model, dtype, ids.numel())
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    model.save_pretrained(tmp_path)
    name: Any = str(dtype).removeprefix("torch.")
    measured = {
        "load": peak_bytes(lambda: load(tmp_path, name), CPU),
        "slice": whole + peak_bytes(lambda: slice_model(model, plan), CPU),
        "verify": whole + peak_bytes(lambda: proven_slice(model, plan, ids, 1e-6), CPU),
    }
    sliced = slice_model(model, plan)
    layers = sum(p.numel() * p.itemsize for p in sliced.model.layers.parameters())
    measured["compensate"] = whole + layers + peak_bytes(lambda: refit(model, sliced, plan, text, LeastSquares()), CPU)
    for importance in (GateTaylor(), Activation(), Refitted(), Refitted(by_loss=False)):
        measured["score"] = whole + peak_bytes(lambda one=importance: one.score(model, text), CPU)
        expected = peaks(work, KEPT, importance, LeastSquares())
        for step, taken in measured.items():
            assert expected[step] == pytest.approx(taken, rel=0.1), (step, importance, expected[step] / taken)


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 500), (torch.bfloat16, 4000)])
def test_shapes_are_tried_in_what_arithmetic_says(dtype, vocabulary, tmp_path):
    model, text = _model(dtype, vocabulary), 4 * _text()
    planner = Planner(model, "toy", text, Magnitude(), Layout(), tmp_path, stage, 6, LeastSquares())
    _ = planner.scores
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    tried = Candidate(3, 320), Candidate(3, 512, (1,))  # about as many parameters go
    plan = plan_for(model, [LayerPlan([], []) if i == 1 else LayerPlan([0, 1, 2], list(range(512))) for i in range(3)])
    pruned = sum(p.numel() * p.itemsize for p in slice_model(model, plan).parameters())
    measured = {
        "probe layers": whole + peak_bytes(lambda: planner.damage, CPU),
        "try shapes": whole + max(peak_bytes(lambda one=one: planner._refitted(one), CPU) for one in tried),
        "perplexity": max(whole, 2 * pruned) + peak_bytes(lambda: mean_nll(model, text), CPU),
    }
    work = replace(_work(model, dtype, 128), **planner.tried_tokens())
    expected = peaks(work, plan.layers, Magnitude(), LeastSquares())
    for step, taken in measured.items():
        assert expected[step] == pytest.approx(taken, rel=0.1), (step, expected[step] / taken)


def test_learning_takes_what_arithmetic_says_where_there_is_much_text():
    model, text = _model(torch.float32, 500), 20 * _text()
    plan = plan_for(model, KEPT)
    sliced = slice_model(model, plan)
    learning = Reconstruction(steps=2, rows=1, damping=[1.0], folds=2)
    measured = peak_bytes(lambda: refit(model, sliced, plan, text, learning), CPU)
    states = len(text) * ROWS * TOKENS * model.config.hidden_size * 4
    assert learning.memory(320, 192, states) == pytest.approx(measured, rel=0.1)
    assert learning.memory(320, 192, states) > 1.1 * LeastSquares(damping=[1.0], folds=2).memory(320, 192, states)


def test_what_is_not_done_takes_nothing():
    work = _work(_model(torch.float32, 500), torch.float32, 100)
    found = peaks(work, KEPT, GateTaylor(), Unchanged())
    assert found["compensate"] == found["slice"] > found["load"]


def test_eight_billion_parameters_fit_a_card_of_80_gb_in_every_step_but_not_one_of_24():
    """Llama-3-8B in bfloat16, a quarter of its channels gone, 128 blocks of 512, verified on two."""
    layer = LayerShape(8, 4, 128, 14336, 2 * 4096 * 4 * 128 + 2 * 4096 * 128, 3 * 4096, 218_112_000)
    work = Workload(
        ModelShape([layer] * 32, 2 * 128256 * 4096 + 4096, 128256 * 4096, 2), 4096, 128256, 512, 65536, 1024
    )
    kept = [LayerPlan(list(range(8)), list(range(10752)))] * 32
    found = {step: size / 1e9 for step, size in peaks(work, kept, GateTaylor(), LeastSquares()).items()}
    assert found["load"] == pytest.approx(16.06, abs=0.01)
    assert 24 < max(found.values()) < 45
    assert found["compensate"] == pytest.approx(16.06 + 11.4 + 1.1 + 12.6, abs=1.5)
