"""Saliency against what it claims to be the derivative of."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.variants import variants
from lightning_modules.token_pruning.evaluation import PruningQuality, pruned_nll
from lightning_modules.token_pruning.losses import normalise
from lightning_modules.token_pruning.samples import split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.scorers.leave_one_out import LeaveOneOut
from lightning_modules.token_pruning.soft_mask import FLOOR, layer_inputs
from lightning_modules.token_pruning.targets import Target
from lightning_modules.token_pruning.targets.future_attention import FutureAttention
from lightning_modules.token_pruning.targets.gate_gradient import GateGradient
from lightning_modules.token_pruning.targets.gradient_norm import GradientNorm
from lightning_modules.token_pruning.targets.gradient_times_hidden import GradientTimesHidden
from lightning_modules.token_pruning.targets.retrieval_attention import RetrievalAttention
from lightning_modules.token_pruning.targets.self_information import SelfInformation
from lightning_modules.token_pruning.targets.signed_gradient_times_hidden import SignedGradientTimesHidden
from lightning_modules.token_pruning.targets.weighted_sum import WeightedSum
from tests.lightning_modules.token_pruning.models import HIDDEN, LAYERS, build, shared, tokens

RESPONSE, LENGTH, LAYER = 6, 30, 1


def _samples(rows=2):
    ids = tokens(rows, LENGTH, seed=1)
    return split_batch({"input_ids": ids, "labels": ids}, RESPONSE)


@torch.no_grad()
def _losses(model, samples, change):
    with layer_inputs(model, samples.real, change):
        logits = model(**samples.inputs(), use_cache=False).logits
    # in double, so that small differences are not lost
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), samples.labels[:, 1:], reduction="none").sum(1) / RESPONSE


def _gated(model, samples, token, gate):
    log_mask = torch.zeros(samples.real.shape, dtype=model.dtype)
    log_mask[:, token] = torch.log(torch.tensor(gate, dtype=model.dtype))
    return _losses(model, samples, lambda index, hidden: (hidden, log_mask if index > LAYER else None))


@pytest.fixture(scope="module")
def double():
    return build("gpt2").double().requires_grad_(False)  # its norms compute in double too


def test_gate_gradient_is_the_derivative_by_the_gate(double):
    samples = _samples()
    found = GateGradient().values(double, samples, [LAYER])[LAYER]
    for token in (0, 7, 20):
        difference = (_gated(double, samples, token, 1 - 1e-5) - _gated(double, samples, token, 1.0)) / 1e-5
        torch.testing.assert_close(found[:, token], difference.float(), rtol=1e-3, atol=1e-5)
    size = GateGradient(signed=False).values(double, samples, [LAYER])[LAYER]
    torch.testing.assert_close(size, found.abs())


def test_gradient_times_hidden_is_the_derivative_by_the_scale_of_a_token(double):
    samples = _samples()
    signed = SignedGradientTimesHidden().values(double, samples, [LAYER])[LAYER]
    torch.testing.assert_close(GradientTimesHidden().values(double, samples, [LAYER])[LAYER], signed.abs())
    for token in (2, 15):

        def scaled(index, hidden, token=token):
            if index == LAYER + 1:
                hidden = hidden.clone()
                hidden[:, token] *= 1 + 1e-6
            return hidden, None

        difference = (_losses(double, samples, scaled) - _losses(double, samples, lambda i, h: (h, None))) / 1e-6
        torch.testing.assert_close(signed[:, token], difference.float(), rtol=1e-3, atol=1e-5)


def test_gradient_norm_is_the_length_of_the_slopes_along_every_axis(double):
    one = _samples(1)
    norm = GradientNorm().values(double, one, [LAYER])[LAYER]
    each = one.pick(torch.zeros(64, dtype=torch.long))
    start = _losses(double, one, lambda i, h: (h, None))

    def moved(index, hidden):
        if index == LAYER + 1:
            hidden = hidden.clone()
            hidden[:, 9] += 1e-6 * torch.eye(64, dtype=torch.double)
        return hidden, None

    slopes = (_losses(double, each, moved) - start) / 1e-6
    assert norm[0, 9].item() == pytest.approx(slopes.norm().item(), rel=1e-3)


@pytest.mark.parametrize("target", [GateGradient(), GradientNorm()], ids=repr)
def test_gradients_of_layers_on_several_devices_come_to_the_prompt(target, monkeypatch):
    def gradients(model, samples, logits, tensors):
        return [torch.zeros(one.shape, device=f"cuda:{number}") for number, one in enumerate(tensors)]

    module = "gate_gradient" if isinstance(target, GateGradient) else "base"
    monkeypatch.setattr(f"lightning_modules.token_pruning.targets.{module}.loss_gradients", gradients)
    samples = _samples()
    with FakeTensorMode(allow_non_fake_inputs=True):  # knows of devices that are not there
        reading = target.reading(shared(), samples, [1, 3])
        for index in range(LAYERS):
            reading.change(index, torch.zeros(*samples.prompt.shape, HIDDEN))
        assert {str(value.device) for value in reading.values(None).values()} == {"cpu"}


def test_future_attention_sums_to_1_over_what_the_response_sees():
    model, samples = shared("llama"), _samples()
    found = FutureAttention().values(model, samples, [LAYER])[LAYER]
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert not found[:, -1].any() and (found[:, : -RESPONSE - 1] > 0).all()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt2"])
def test_future_attention_is_what_the_eager_kernel_returns(family):
    model, samples = build(family).eval(), _samples()
    found = FutureAttention().values(model, samples, [0, LAYER])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**samples.inputs(), use_cache=False, output_attentions=True).attentions
    for layer in (0, LAYER):
        paid = torch.stack([a.mean(1)[:, -RESPONSE - 1 : -1].mean(1) for a in attentions[layer + 1 :]]).mean(0)
        torch.testing.assert_close(found[layer], paid)


def test_gate_gradient_points_where_leaving_a_token_out_does():
    model, samples = shared("llama"), _samples(1)
    found = GateGradient().values(model, samples, [LAYER])[LAYER][0, : LENGTH - RESPONSE]
    whole = _gated(model, samples, 0, 1.0)
    removed = torch.stack([_gated(model, samples, token, FLOOR)[0] - whole[0] for token in range(LENGTH - RESPONSE)])
    assert F.cosine_similarity(found, removed, dim=0) > 0.5


@torch.no_grad()
def test_self_information_of_a_token_is_what_the_model_reading_up_to_it_did_not_expect():
    model, ids = shared("llama"), tokens(1, LENGTH, seed=1)
    pad = torch.zeros(1, 4, dtype=torch.long)
    padded = {"input_ids": torch.cat([pad, ids], 1), "labels": torch.cat([pad - 100, ids], 1)}
    padded["attention_mask"] = torch.cat([pad, torch.ones_like(ids)], 1)
    found = SelfInformation().values(model, split_batch(padded, RESPONSE), [LAYER])[LAYER][0, 4:]
    assert found[0].item() == pytest.approx(math.log(model.config.vocab_size))
    for token in (1, 12, LENGTH - RESPONSE - 1):
        expected = -model(ids[:, :token]).logits[0, -1].log_softmax(-1)[ids[0, token]]
        torch.testing.assert_close(found[token], expected)


def test_a_weighted_sum_adds_targets_of_one_scale():
    model, samples = shared("llama"), _samples()
    parts = [FutureAttention(), SelfInformation()]
    first, second = (normalise(part.values(model, samples, [LAYER])[LAYER], samples.prompt) for part in parts)
    for weights, expected in ((None, first + second), ([2.0, -1.0], 2 * first - second)):
        torch.testing.assert_close(WeightedSum(parts, weights).values(model, samples, [LAYER])[LAYER], expected)
    described = WeightedSum([GateGradient(signed=False)]).describe()
    assert json.loads(json.dumps(described)) == {
        "class": "WeightedSum",
        "targets": [{"class": "GateGradient", "signed": False}],
        "weights": [1.0],
    }
    with pytest.raises(ValueError, match="one weight for each"):
        WeightedSum(parts, [1.0])
    with pytest.raises(ValueError, match="one weight for each"):
        WeightedSum([])


def test_a_weighted_sum_shows_what_overflowed():
    class Overflows(FutureAttention):
        def reading(self, model, samples, layers):
            reading = super().reading(model, samples, layers)

            def values(logits):
                found = reading.values(logits)
                found[LAYER][0, 3] = torch.inf
                return found

            return replace(reading, values=values)

    found = WeightedSum([SelfInformation(), Overflows()]).values(shared("llama"), _samples(), [LAYER])[LAYER]
    assert not found[0].isfinite().all() and found[1].isfinite().all()


KNOWN = [target for target in variants(Target) if target.__module__.startswith("lightning_modules.")]
OURS = [example for target in KNOWN for example in target.examples()]


@pytest.mark.parametrize("target", OURS, ids=lambda t: type(t).__name__)
def test_every_target_ignores_padding_other_samples_and_the_prompt_s_own_labels(target):
    model, both = shared("llama"), _samples()
    together = target.values(model, both, [0, 3])
    alone = target.values(model, both.pick(torch.tensor([1])), [0, 3])
    ids, pad = both.input_ids[1:], torch.zeros(1, 7, dtype=torch.long)
    labels = torch.cat([both.labels[1:], pad - 100], 1)
    mask = torch.cat([torch.ones_like(ids), pad], 1)
    padded = split_batch({"input_ids": torch.cat([ids, pad], 1), "labels": labels, "attention_mask": mask}, 3)
    padded_values = target.values(model, padded, [0, 3])
    for layer in (0, 3):
        assert together[layer].shape == (2, LENGTH) and together[layer].dtype == torch.float32
        torch.testing.assert_close(together[layer][1:], alone[layer], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(padded_values[layer][:, :LENGTH], alone[layer], rtol=1e-3, atol=1e-6)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


def test_the_one_known_to_be_wrong_is_labelled():
    assert [t.__name__ for t in KNOWN if t.control] == ["SignedGradientTimesHidden"]


def _ran(model):
    """Indices of the layers that run, in order."""
    ran = []
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


def test_several_targets_share_one_pass_and_change_no_number():
    model, samples = build("llama").requires_grad_(False), _samples()
    targets = [FutureAttention(), SelfInformation(), GateGradient(), GradientNorm()]
    alone = [normalise(target.values(model, samples, [1, 3])[3], samples.prompt) for target in targets]
    ran = _ran(model)
    for chosen in ([0, 1], [0, 1, 2, 3]):
        found = WeightedSum([targets[i] for i in chosen], [1.0 + i for i in chosen]).values(model, samples, [1, 3])[3]
        wanted = sum((1.0 + i) * alone[i] for i in chosen)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert ran == list(range(6))
        ran.clear()


def _flat_attention(module, query, key, value, mask, **options):
    """What flash attention makes of two rows in one: each for itself."""
    rows = [part.unflatten(2, (2, LENGTH))[0].transpose(0, 1) for part in (query, key, value)]
    found, _ = sdpa_attention_forward(module, *rows, None, **options)
    return found.reshape(1, 2 * LENGTH, *found.shape[2:]), None


@pytest.mark.parametrize(
    "target", [FutureAttention(), RetrievalAttention({3: [1]}, 4, pool=3), SelfInformation()], ids=repr
)
def test_rows_that_are_read_as_one_are_still_rows(target):
    AttentionInterface.register("flat_flash", _flat_attention)
    model, samples = build("llama"), _samples()
    wanted = target.values(model, samples, [1, 2])
    model.config._attn_implementation_internal = "flat_flash"
    for layer, value in target.values(model, samples, [1, 2]).items():
        torch.testing.assert_close(value, wanted[layer], rtol=1e-4, atol=1e-6)


def test_logits_of_prompts_are_made_only_for_who_reads_them():
    model, samples = build("llama").requires_grad_(False), _samples()
    widths = []
    model.lm_head.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    GateGradient().values(model, samples, [1, 3])
    GradientNorm().values(model, samples, [1, 3])
    WeightedSum([FutureAttention(), GateGradient()]).values(model, samples, [1, 3])
    pruned_nll(model, samples, Schedule(layers=[1, 3], keep=0.6, sinks=2, tail=0.0, min_tail=3), HiddenNorm())
    PruningQuality([]).update(model, None, None, None, samples)
    LeaveOneOut().measure(model, samples, [3])
    assert len(widths) > 6 and set(widths) == {RESPONSE + 1}
    WeightedSum([SelfInformation(), GateGradient()]).values(model, samples, [1, 3])
    assert widths[-1] == LENGTH


def test_layers_that_no_target_needs_do_not_run():
    model, samples = build("llama"), _samples()
    ran = _ran(model)
    FutureAttention().values(model, samples, [1])
    assert ran == [0, 1, 2, 3, 4]  # the last one's attention follows from what enters it
    ran.clear()
    model(samples.input_ids)
    assert ran == list(range(6))  # and nothing is left behind
