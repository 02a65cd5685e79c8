"""Pruning by mask is pruning: against layers run by hand on the tokens that are left."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.evaluation import pruned_nll
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.samples import split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.soft_mask import FLOOR, Budget, Pruning, keep_best, layer_inputs
from tests.lightning_modules.token_pruning.models import FAMILIES, LAYERS, build, shared, tokens

SCHEDULE = Schedule(layers=[1, 3], keep=0.6, sinks=2, tail=0.0, min_tail=3)


def _norm(layer, hidden, there=None):
    return hidden.norm(dim=-1) * (1 + layer)


def _samples(rows=2, length=40, response=6):
    ids = tokens(rows, length)
    return split_batch({"input_ids": ids, "labels": ids}, response)


def _masked(model, samples, temperature=None, score=_norm):
    pruning = Pruning(score, samples.prompt, Budget.of(SCHEDULE, LAYERS, samples.prompt), temperature)
    with layer_inputs(model, samples.real, pruning):
        return model(**samples.inputs(), use_cache=False).logits, pruning


def _by_hand(model, ids):
    """Logits of a Llama whose layers get only the tokens that are left, and the places of these tokens."""
    decoder, places = model.model, torch.arange(ids.shape[1])
    hidden = decoder.embed_tokens(ids)
    prompt = ids.shape[1] - 6
    for index, layer in enumerate(decoder.layers):
        if index - 1 in (1, 3):
            stage = (1, 3).index(index - 1)
            scores = _norm(index - 1, hidden)[0].clone()
            scores[places >= prompt] = torch.inf  # the response is not pruned, nor are sinks and tail
            scores[(places < 2) | (places >= prompt - 3)] = torch.inf
            count = SCHEDULE.budget(stage, prompt) + 6
            left = scores.topk(count).indices.sort().values
            hidden, places = hidden[:, left], places[left]
        rotary = decoder.rotary_emb(hidden, places[None])
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
    return model.lm_head(decoder.norm(hidden)), places


@torch.no_grad()
def test_masked_equals_layers_run_by_hand_on_the_tokens_left():
    model, samples = shared("llama"), _samples(rows=1)
    masked, pruning = _masked(model, samples)
    dropped, places = _by_hand(model, samples.input_ids)
    assert len(places) == SCHEDULE.budget(1, 34) + 6 < 40
    assert pruning.alive[3][0].nonzero()[:, 0].tolist() == places.tolist()
    torch.testing.assert_close(masked[:, places], dropped, rtol=1e-4, atol=1e-4)
    whole = model(samples.input_ids).logits
    assert (whole[:, -1] - dropped[:, -1]).abs().max() > 0.1  # the tokens dropped do matter here


@torch.no_grad()
def test_pooled_scores_choose_what_the_pruned_prefill_chooses():
    model, samples = shared("llama"), _samples(rows=1, length=60)
    schedule, scorer = Schedule(layers=[1, 3], keep=0.5, sinks=2, tail=0.0, min_tail=3, pool=5), HiddenNorm()
    _, _, masked = pruned_nll(model, samples, schedule, scorer)
    with PromptPruner(scorer, schedule).prefill(model) as run:
        model(samples.input_ids[:, :54])
    assert torch.equal(torch.stack([masked.alive[layer][:, :54] for layer in (1, 3)]), run.kept())
    single = pruned_nll(model, samples, Schedule(layers=[1, 3], keep=0.5, sinks=2, tail=0.0, min_tail=3), scorer)[2]
    assert not torch.equal(single.alive[3], masked.alive[3])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_straight_through_mask_computes_what_its_hard_choice_does(family, kernel):
    model, samples = shared(family, kernel), _samples()
    torch.manual_seed(3)
    soft, chosen = _masked(model, samples, temperature=1.0)
    again, hard = _masked(model, samples, score=lambda layer, *_: chosen.alive[layer].float())
    assert all(torch.equal(chosen.alive[layer], hard.alive[layer]) for layer in (1, 3))
    torch.testing.assert_close(soft, again, rtol=1e-4, atol=1e-4)
    assert not torch.equal(chosen.alive[3], _masked(model, samples)[1].alive[3])  # noise changed the choice


@torch.no_grad()
def test_padding_changes_nothing():
    model, single = shared("llama"), _samples(rows=1, length=34)
    pad = torch.zeros(1, 9, dtype=torch.long)
    ids = torch.cat([pad, single.input_ids], 1)
    labels = torch.cat([pad - 100, single.labels], 1)
    padded = split_batch({"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}, 6)
    expected, _ = _masked(model, single)
    logits, pruning = _masked(model, padded)
    assert logits.isfinite().all()
    alive = pruning.alive[3][0, 9:] & single.prompt[0]
    torch.testing.assert_close(logits[:, 9:][:, alive], expected[:, alive], rtol=1e-4, atol=1e-4)


def test_gradient_is_that_of_the_policy_softmax_even_for_dropped_tokens():
    """d loss / d mask at a hard 0 against a finite difference of the attention with exp(a)·m."""
    # GPT-2, whose norms compute in double precision
    model, samples = build("gpt2").double().requires_grad_(False), _samples(rows=1)

    def loss(mask):
        def change(index, hidden):
            return hidden, torch.log(FLOOR + (1 - FLOOR) * mask) if index > 1 else None

        with layer_inputs(model, samples.real, change):
            return model(**samples.inputs(), use_cache=False).logits[0, -1].logsumexp(0)

    mask = torch.ones(1, 40, dtype=torch.double)
    mask[0, [5, 9]] = 0
    mask.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(mask), mask)
    for place in (5, 9, 12):
        step = torch.zeros_like(mask)
        step[0, place] = 1e-8 if place != 12 else -1e-8
        difference = (loss(mask.detach() + step) - loss(mask.detach())) / step[0, place]
        assert gradient[0, place] == pytest.approx(difference.item(), rel=0.05, abs=1e-6)
        assert gradient[0, place] != 0


def test_gradients_reach_the_scores_of_dropped_and_kept_tokens():
    model, samples = shared("llama").requires_grad_(False), _samples(rows=1)
    offset = torch.zeros(1, 40, requires_grad=True)
    torch.manual_seed(0)
    logits, pruning = _masked(model, samples, 1.0, lambda layer, hidden, _: hidden.norm(dim=-1) + offset)
    logits[0, -6:].logsumexp(-1).sum().backward()
    kept, prompt = pruning.alive[1][0], samples.prompt[0]
    protected = Budget.of(SCHEDULE, LAYERS, samples.prompt).protected[0]
    assert (offset.grad[0][kept & prompt & ~protected] != 0).all()
    assert (offset.grad[0][~kept] != 0).any()
    assert not offset.grad[0][protected | ~prompt].any()


@pytest.mark.parametrize(("free", "pool"), [(1, 1), (5, 17)])
def test_gradients_are_finite_where_scores_cannot_differ(free, pool):
    """One token that may be dropped, or several whose means are over the same tokens."""
    length = SCHEDULE.sinks + SCHEDULE.min_tail + free
    samples = _samples(rows=1, length=length + 6)
    budget = Budget.of(SCHEDULE, LAYERS, samples.prompt)
    assert int((samples.prompt & ~budget.protected).sum()) == free
    scores = torch.randn(1, length + 6, requires_grad=True)
    pruning = Pruning(lambda *_: scores, samples.prompt, budget, temperature=1.0, pool=pool)
    masks = [pruning(index, torch.zeros(1, length + 6, 4))[1] for index in range(LAYERS)]
    masks[-1].sum().backward()
    assert scores.grad.isfinite().all()


def test_the_mask_of_a_later_stage_is_multiplied_into_that_of_the_stages_before():
    samples = _samples(rows=1)
    budget = Budget.of(SCHEDULE, LAYERS, samples.prompt)
    scores = {layer: torch.randn(1, 40, requires_grad=True) for layer in budget.stages}
    together = Pruning(lambda layer, *_: scores[layer], samples.prompt, budget, temperature=1.0)
    found = {}
    for index in range(LAYERS):
        torch.manual_seed(index)
        found[index] = together(index, torch.zeros(1, 40, 4))[1]
    assert found[1] is None and torch.equal(found[2], found[3]) and torch.equal(found[4], found[5])
    first, second = budget.stages
    free = together.alive[first] & samples.prompt & ~budget.protected
    both = found[4][free].sum()
    (through_first,) = torch.autograd.grad(both, scores[first], retain_graph=True)
    (alone,) = torch.autograd.grad(found[2][free].sum(), scores[first], retain_graph=True)
    (through_second,) = torch.autograd.grad(both, scores[second])
    # log(m₁·m₂): the first stage's scores count after the second stage as they did before it
    assert torch.equal(through_first, alone) and alone.any() and through_second.any()
    gone = ~together.alive[first]
    assert (found[4][gone] <= 2 * math.log(FLOOR) + 1e-3).all()  # dropped twice


@torch.no_grad()
def test_noise_is_as_large_as_the_scores_that_it_disturbs():
    model, samples, chosen = shared("llama"), _samples(), []
    for scale in (1.0, 1e4):
        torch.manual_seed(0)
        _, pruning = _masked(model, samples, 1.0, lambda layer, hidden, _, scale=scale: scale * _norm(layer, hidden))
        chosen.append(pruning.alive)
    _, without = _masked(model, samples)
    for layer in (1, 3):
        assert torch.equal(chosen[0][layer], chosen[1][layer])
        assert not torch.equal(chosen[1][layer], without.alive[layer])


def test_the_best_stay_and_of_equals_the_earlier():
    scores = torch.tensor([[5.0, 1.0, 4.0, 4.0, 0.0], [0.0, 0.0, 0.0, 9.0, 9.0]])
    candidates = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]], dtype=torch.bool)
    protected = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    kept, cut = keep_best(scores, candidates, protected, [3, 2])
    assert kept.int().tolist() == [[1, 0, 1, 0, 1], [1, 0, 0, 0, 1]]
    assert cut.tolist() == [4.0, 0.0]


def test_an_attention_without_masks_is_refused():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"), layer_inputs(model, torch.ones(1, 4).bool(), None):
        pass


class _Shapes(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns, by the product of its last two sizes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and one.ndim > 2:
                self.largest = max(self.largest, one.shape[-1] * one.shape[-2])
        return result


@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_attention_in_blocks_is_that_of_one_large_mask(family, kernel, monkeypatch):
    """Against the model's own kernel and one additive mask [B, 1, N, N], logits and gradients."""
    model, ids = build(family, kernel).requires_grad_(False), tokens(2, 40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :7] = False
    samples = split_batch({"input_ids": ids, "labels": ids, "attention_mask": real.long()}, 6)
    causal, itself = torch.ones(40, 40).tril().bool(), torch.eye(40).bool()
    gate = torch.rand(2, 40).masked_fill(torch.rand(2, 40) < 0.3, 1e-6).requires_grad_()

    def whole(index, args, kwargs):
        bias = gate.log()[:, None] if index > 1 else torch.zeros(2, 1, 40)
        mask = bias.masked_fill(itself, 0.0).masked_fill(~(causal & real[:, None] | itself), torch.finfo().min)
        call = dict(zip(parts.arguments, args, strict=False)) | kwargs
        return (call.pop("hidden_states"),), call | {"attention_mask": mask[:, None]}

    def judge(logits):
        logits[:, -6:].logsumexp(-1).sum().backward()
        found, gate.grad = gate.grad, None
        return logits.detach()[real], found

    parts = anatomy(model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: whole(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(parts.layers)
    ]
    wanted = judge(model(**samples.inputs(), use_cache=False).logits)
    for hook in hooks:
        hook.remove()
    for block in (512, 40, 16):
        monkeypatch.setattr("lightning_modules.token_pruning.masked_attention.BLOCK", block)
        with layer_inputs(model, real, lambda index, hidden: (hidden, gate.log() if index > 1 else None)):
            found = judge(model(**samples.inputs(), use_cache=False).logits)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == kernel


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_no_tensor_has_tokens_times_tokens_elements(temperature, monkeypatch):
    monkeypatch.setattr("lightning_modules.token_pruning.masked_attention.BLOCK", 16)
    model, samples = build("llama", "eager", vocab_size=199).requires_grad_(False), _samples(rows=1, length=400)
    with _Shapes() as shapes:
        weight = torch.ones(64, requires_grad=temperature is not None)
        logits, _ = _masked(model, samples, temperature, lambda layer, hidden, _: hidden @ weight)
        if temperature is not None:
            logits[0, -6:].logsumexp(-1).sum().backward()
            assert weight.grad.any()
    assert 0 < shapes.largest <= 400 * 199 < 400 * 400
