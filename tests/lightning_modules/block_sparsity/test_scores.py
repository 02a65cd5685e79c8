"""Every score, and the calibration that streams through the layers."""

from types import SimpleNamespace

import pytest
import torch

from common.variants import variants
from lightning_modules.block_sparsity.inputs import collecting
from lightning_modules.block_sparsity.layerwise import inside
from lightning_modules.block_sparsity.matrices import linear_layers
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.scores.base import Score
from lightning_modules.block_sparsity.scores.gradient import Gradient
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.stream import LayerInputs, decoder_layers
from tests.lightning_modules.block_sparsity.toy import batches, padded, tiny_llama

CPU = torch.device("cpu")


def _statistics(score, model, text):
    """What a score knows of every matrix of a model as it is."""
    matrices = linear_layers(model)
    known = score.statistics(model, matrices, text, CPU)
    if score.needs_inputs:
        for matrix, inputs in _inputs(model, text, moments=score.needs_moments).items():
            known[matrix] = score.statistic(matrices[matrix].weight, inputs)
    return known


@torch.no_grad()
def _inputs(model, text, moments=False):
    found, stream = {}, LayerInputs(model, text, CPU)
    for layer in decoder_layers(model).values():
        with collecting(inside(layer, linear_layers(model)), stream, moments) as inputs:
            stream.advance(layer)
        found |= inputs
    return found


EXAMPLES = [example for kind in variants(Score) for example in kind.examples()]  # type: ignore[type-abstract]


@pytest.mark.parametrize("score", EXAMPLES, ids=repr)
def test_scores_are_finite_not_negative_repeatable_and_leave_the_model_alone(score):
    model, text = tiny_llama(), batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    matrices = linear_layers(model)
    statistics = _statistics(score, model, text)
    for name, matrix in matrices.items():
        whole = score.score(matrix.weight, statistics.get(name))
        assert whole.shape == matrix.weight.shape and whole.dtype == torch.float32
        assert (whole >= 0).all() and whole.isfinite().all()
        assert torch.equal(whole, score.score(matrix.weight, statistics.get(name)))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("relative", ["", "rows", "matrix"])
@pytest.mark.parametrize("shape", [None, (37,), (44, 37)])
def test_blocks_have_the_scores_that_their_rows_have(shape, relative):
    draw = torch.Generator().manual_seed(0)
    weight, keep = torch.randn(44, 37, generator=draw), torch.rand(44, 37, generator=draw) > 0.5
    statistic = torch.rand(shape, generator=draw) if shape else None
    expected = weight.abs() * (1.0 if statistic is None else statistic)
    formula = Magnitude() if statistic is None else Wanda()
    scores = Scored(weight, formula.score, statistic)
    if relative == "rows":
        expected = expected / ((expected * keep).sum(1) / keep.sum(1))[:, None]
        scores = scores.relative_to_rows(keep)
    elif relative == "matrix":
        expected = expected / expected[keep].mean()
        scores = scores.relative_to_matrix(keep)
    torch.testing.assert_close(scores.rows(slice(5, 23)), expected[5:23])
    index = (torch.arange(6).repeat_interleave(5), torch.arange(5).repeat(6))
    blocks = torch.cat([part for _, part in scores.blocks(index, 8)])
    whole = blocks.view(6, 5, 8, 8).transpose(1, 2).reshape(48, 40)
    torch.testing.assert_close(whole[:44, :37], expected)


def test_streamed_sums_are_those_of_a_whole_forward_pass():
    model, text = tiny_llama(), batches()
    matrices, seen = linear_layers(model), {}

    def add(name):
        def hook(_, args):
            seen.setdefault(name, []).append(args[0].double().flatten(0, -2))

        return hook

    hooks = [m.register_forward_pre_hook(add(name)) for name, m in matrices.items()]
    with torch.no_grad():
        for batch in text:
            model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    found = _inputs(model, text, moments=True)
    for name, parts in seen.items():
        x = torch.cat(parts)
        assert found[name].tokens == len(x)
        torch.testing.assert_close(found[name].squares.double(), x.pow(2).sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].moments.total.double(), x.T @ x, rtol=1e-4, atol=1e-4)
    attention = [found[f"model.layers.0.self_attn.{part}_proj"] for part in "qkvo"]
    assert attention[0] is attention[1] is attention[2] is not attention[3]  # one sum for three matrices


def test_matrices_that_are_sometimes_given_the_same_tensor_are_counted_once_each():
    """As experts are, which see some of the tokens of some batches."""
    one, two, idle = (torch.nn.Linear(4, 2) for _ in range(3))
    stream = SimpleNamespace(on_tokens=lambda x: x)
    first, second = torch.randn(3, 4), torch.randn(5, 4)
    with collecting({"one": one, "two": two, "idle": idle}, stream) as found:
        for x in (first, second):
            one(x), two(x)
    both = torch.cat([first, second]).pow(2).sum(0)
    torch.testing.assert_close(found["one"].squares, both)
    torch.testing.assert_close(found["two"].squares, both)
    assert found["idle"].tokens == 0 and found["one"].tokens == 8


def test_wanda_is_weight_times_norm_of_the_current_weights():
    model, text = tiny_llama(), batches()
    matrices = linear_layers(model)
    first = _statistics(Wanda(), model, text)
    name = "model.layers.0.mlp.down_proj"
    expected = matrices[name].weight.abs() * first[name][None]
    torch.testing.assert_close(Wanda().score(matrices[name].weight, first[name]), expected)
    with torch.no_grad():
        matrices["model.layers.0.mlp.up_proj"].weight.mul_(2)
    torch.testing.assert_close(_statistics(Wanda(), model, text)[name], 2 * first[name])


def test_gradient_is_weight_times_mean_absolute_gradient():
    model, text = tiny_llama(), batches(2)
    matrices = linear_layers(model)
    name = "model.layers.1.self_attn.o_proj"
    wanted = torch.zeros_like(matrices[name].weight)
    for batch in text:
        model.zero_grad()
        model(**batch).loss.backward()
        wanted += matrices[name].weight.grad.abs() / 2
    model.zero_grad()
    found = Gradient().statistics(model, matrices, text, CPU)[name]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("score", [Wanda(), Gradient()], ids=repr)
def test_statistics_of_padded_and_packed_text_are_those_of_its_samples_alone(score, side):
    model = tiny_llama()
    text = batches(1, rows=2, tokens=12)[0]
    if isinstance(score, Wanda):
        alone = [{name: part[row : row + 1, :n] for name, part in text.items()} for row, n in ((0, 7), (1, 4))]
    else:  # a mean over the tokens of a batch, so all in one
        alone = [{name: part[:, :7] for name, part in text.items()}]
    lengths = [7, 4] if isinstance(score, Wanda) else [7, 7]
    wanted = _statistics(score, model, alone)
    found = _statistics(score, model, [padded(text, lengths, side)])
    ids = torch.cat([text["input_ids"][row, :n] for row, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = _statistics(score, model, [{"input_ids": ids, "labels": ids, "position_ids": positions}])
    for name, statistic in wanted.items():
        torch.testing.assert_close(found[name], statistic, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(packed[name], statistic, rtol=1e-4, atol=1e-6)


def test_only_one_layers_inputs_are_held():
    model, text = tiny_llama(), batches()
    inputs = LayerInputs(model, text, CPU)
    with torch.no_grad():
        for layer in decoder_layers(model).values():
            inputs.advance(layer)
            assert len(inputs.hidden) == len(text)
        logits = model.lm_head(model.model.norm(inputs.hidden[0]))
        torch.testing.assert_close(logits, model(input_ids=text[0]["input_ids"]).logits)


def test_models_without_linear_layers_and_no_text_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="llama"):
        linear_layers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)))
    model = tiny_llama()
    with pytest.raises(ValueError, match="calibration"):
        LayerInputs(model, [], CPU)
