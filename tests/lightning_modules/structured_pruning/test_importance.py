"""What every importance must do, and what each claims to compute."""

import pytest
import torch
import torch.nn.functional as F

from common.variants import variants
from lightning_modules.structured_pruning.importance import Importance, LayerScores
from lightning_modules.structured_pruning.importance.activation import Activation
from lightning_modules.structured_pruning.importance.base import Keep, best, checked
from lightning_modules.structured_pruning.importance.fluctuation import Fluctuation
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.structured_pruning.importance.misaligned import Misaligned
from lightning_modules.structured_pruning.importance.refitted import Refitted, elimination_costs
from lightning_modules.structured_pruning.importance.sequential_taylor import SequentialTaylor
from lightning_modules.structured_pruning.importance.weight_taylor import WeightTaylor
from lightning_modules.structured_pruning.layers import ATTENTION, MLP, decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.structured_pruning.toy import batches, plan_for, tiny, two_samples

ALL = [example for kind in variants(Importance) for example in kind.examples()]


def _loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("importance", ALL, ids=repr)
def test_every_importance_scores_all_parts_and_leaves_the_model_as_it_was(importance):
    model = tiny("qwen2")
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before, wanted = model_hash(model), [p.requires_grad for p in model.parameters()]
    scores = importance.score(model, batches())
    for layer, part in zip(decoder_layers(model), scores, strict=True):
        shape = shape_of(layer)
        assert part.groups.shape == (shape.groups,) and part.channels.shape == (shape.channels,)
        assert part.groups.dtype == part.channels.dtype == torch.float32
    checked(scores)
    assert model_hash(model) == before and [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    again = importance.score(model, batches())
    assert all(torch.equal(a, b) for x, y in zip(scores, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("importance", ALL, ids=repr)
def test_samples_score_the_same_packed_and_padded_on_either_side(importance):
    """Padding counts for nothing, and no sample sees another: three layouts of the same two samples."""
    keep = [Keep(2, 16)] * 4
    found = []
    for batch in two_samples().values():
        model = tiny()
        scores = importance.score(model, [batch])
        found.append(importance.rescore(model, [batch], scores, keep))
    for other in found[1:]:
        for layer, expected in zip(other, found[0], strict=True):
            for part, wanted in zip(layer, expected, strict=True):
                torch.testing.assert_close(part, wanted, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("importance", ALL, ids=repr)
def test_sound_importances_keep_queries_with_their_keys_and_controls_say_that_they_are_controls(importance):
    if not importance.control:
        assert importance.query_heads([0, 2], 2) is None


def _gate_gradients(model, batch, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gates on each token's groups and channels of a layer, by autograd on the gates themselves."""
    block, shape = model.model.layers[layer], shape_of(model.model.layers[layer])
    rows, tokens = batch["input_ids"].shape
    heads = torch.ones(rows, tokens, shape.groups, requires_grad=True)
    width = torch.ones(rows, tokens, shape.channels, requires_grad=True)
    spread = shape.n_rep * shape.head_dim
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: (a[0] * heads.repeat_interleave(spread, -1),)),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a: (a[0] * width,)),
    ]
    found = torch.autograd.grad(_loss(model, batch), [heads, width])
    for hook in hooks:
        hook.remove()
    return found[0], found[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gate_scores_are_squared_gradients_of_gates(checkpointing):
    model = tiny()
    if checkpointing:
        # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()  # without dropout this only switches checkpointing on
    scores = GateTaylor().score(model, batches())
    model.eval()
    for layer in (0, 3):
        gradients = [_gate_gradients(model, batch, layer) for batch in batches()]
        for kind, score in enumerate(scores[layer]):
            expected = sum(pair[kind].square().sum((0, 1)) for pair in gradients)
            torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_weight_scores_are_sums_of_weight_times_gradient(name):
    model = tiny(name)
    scores = WeightTaylor().score(model, batches())
    totals = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches():
        _loss(model, batch).backward()
        for n, p in model.named_parameters():
            totals[n] += (p * p.grad).abs().detach()
        model.zero_grad()
    for i, part in enumerate(scores):

        def total(projection: str, i: int = i) -> torch.Tensor:
            block = "self_attn" if projection in ATTENTION else "mlp"
            name = f"model.layers.{i}.{block}.{projection}"
            found = totals[f"{name}.weight"].sum(0 if projection in ("o_proj", "down_proj") else 1)
            return found + totals.get(f"{name}.bias", torch.zeros(())) if projection != "o_proj" else found

        # group g: query heads 2g and 2g + 1, key-value head g; a head has 6 rows
        rows = {p: total(p).view(-1, 6).sum(1) for p in ATTENTION}
        expected = [
            sum(rows[p][2 * g : 2 * g + 2].sum() for p in ("q_proj", "o_proj")) + rows["k_proj"][g] + rows["v_proj"][g]
            for g in range(4)
        ]
        torch.testing.assert_close(part.groups, torch.stack(expected), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part.channels, sum(total(p) for p in MLP), rtol=1e-4, atol=1e-6)


def _with_one_dead_group(dead: int):
    """A model in which one group of the first layer sends nothing on, so nothing of it matters."""
    model = tiny()
    attention = model.model.layers[0].self_attn
    columns = 2 * attention.head_dim
    attention.o_proj.weight.data[:, dead * columns : (dead + 1) * columns] = 0
    return model


@pytest.mark.parametrize("importance", [GateTaylor, WeightTaylor, Activation, Fluctuation, SequentialTaylor, Refitted])
@pytest.mark.parametrize("dead", [0, 2])
def test_a_group_that_sends_nothing_on_scores_nothing(importance, dead):
    groups = importance().score(_with_one_dead_group(dead), batches())[0].groups
    assert groups[dead] == 0 and (groups > 0).sum() == 3


def test_the_misaligned_control_spreads_heads_over_the_wrong_groups():
    wrong = Misaligned().score(_with_one_dead_group(1), batches())[0].groups
    right = WeightTaylor().score(_with_one_dead_group(1), batches())[0].groups
    assert wrong[1] > 0 and right[1] == 0
    torch.testing.assert_close(wrong.sum(), right.sum())  # the same salience, counted elsewhere


def test_sequential_scores_see_earlier_layers_pruned():
    model = tiny()
    keep = [Keep(2, 16)] * 4
    scores = SequentialTaylor().rescore(model, batches(), [], keep)
    first = LayerPlan(best(scores[0].groups, 2), best(scores[0].channels, 16))
    whole = LayerPlan([0, 1, 2, 3], list(range(48)))
    sliced = slice_model(model, plan_for(model, [first, whole, whole, whole]))
    expected = WeightTaylor().score(sliced, batches())[1]
    torch.testing.assert_close(scores[1].groups, expected.groups, rtol=1e-3, atol=1e-6)
    unpruned = WeightTaylor().score(model, batches())
    torch.testing.assert_close(scores[0].groups, unpruned[0].groups)
    assert not torch.allclose(scores[1].groups, unpruned[1].groups, rtol=1e-2)


def test_activation_is_the_energy_that_reaches_the_residual_stream():
    model = tiny()
    inputs = {}
    attention, mlp = model.model.layers[2].self_attn, model.model.layers[2].mlp
    for name, linear in (("o", attention.o_proj), ("down", mlp.down_proj)):
        linear.register_forward_pre_hook(lambda m, a, name=name: inputs.__setitem__(name, a[0].flatten(0, 1)))
    batch = batches(1)
    scores = Activation().score(model, batch)[2]
    channel = inputs["down"][:, [5]] @ mlp.down_proj.weight[:, [5]].T
    torch.testing.assert_close(scores.channels[5], channel.square().sum())
    energy = [(inputs["o"][:, [c]] @ attention.o_proj.weight[:, [c]].T).square().sum() for c in range(12, 24)]
    torch.testing.assert_close(scores.groups[1], torch.stack(energy).sum())


def test_fluctuation_is_the_energy_that_a_constant_cannot_make_up_for():
    model = tiny()
    inputs = []
    mlp = model.model.layers[2].mlp
    mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1)))
    scores = Fluctuation().score(model, batches())[2]
    sent = torch.cat(inputs)[:, [5]] @ mlp.down_proj.weight[:, [5]].T
    torch.testing.assert_close(scores.channels[5], (sent - sent.mean(0)).square().sum(1).mean(), rtol=1e-4, atol=1e-9)


def test_scores_that_cannot_rank_are_refused():
    unpredicted = [{"input_ids": b["input_ids"], "labels": torch.full_like(b["labels"], -100)} for b in batches()]
    with pytest.raises(ValueError, match=r"layer 0.*no gradient"):
        checked(GateTaylor().score(tiny(), unpredicted))
    with pytest.raises(ValueError, match="not finite"):
        checked([LayerScores(torch.tensor([1.0, torch.nan]), torch.ones(3))])


def _least_error(weight, xx, kept: list[int]) -> float:
    """Σ ‖W x − V x‖² + λ ‖W − V‖² at its least over V with these columns alone, by least squares on a square root."""
    root = torch.linalg.cholesky(xx).T
    target = root @ weight.T
    fitted = torch.linalg.lstsq(root[:, kept], target).solution
    return float((target - root[:, kept] @ fitted).square().sum())


@pytest.mark.parametrize(("parts", "width"), [(12, 1), (5, 3)], ids=["channels", "groups"])
def test_what_a_part_costs_after_refitting_is_what_least_squares_says(parts, width):
    draw = torch.Generator().manual_seed(0)
    size = parts * width
    x = torch.randn(60, size, generator=draw, dtype=torch.float64) @ torch.randn(size, size, generator=draw).double()
    weight, xx = torch.randn(7, size, generator=draw, dtype=torch.float64), x.T @ x

    def columns(some: list[int]) -> list[int]:
        return [part * width + i for part in some for i in range(width)]

    left, error, dearest, expected = list(range(parts)), 0.0, 0.0, torch.zeros(parts, dtype=torch.float64)
    while len(left) > 1:
        costs = {p: _least_error(weight, xx, columns([q for q in left if q != p])) - error for p in left}
        gone = min(costs, key=costs.__getitem__)
        dearest = max(dearest, costs[gone])
        expected[gone] = dearest
        left.remove(gone)
        error += costs[gone]
    expected[left[0]] = max(dearest, float((torch.linalg.cholesky(xx).T @ weight.T).square().sum()) - error)
    torch.testing.assert_close(elimination_costs(weight, xx, parts), expected, rtol=1e-8, atol=1e-8)


def test_of_two_channels_that_say_the_same_one_is_cheap():
    model = tiny()
    mlp = model.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data[7] = linear.weight.data[5]
    mlp.down_proj.weight.data[:, [5, 7]] *= 5
    text = batches(20)
    for refitted in (Refitted(damping=1e-6), Refitted(damping=1e-6, by_loss=False)):
        found = refitted.score(model, text)[1].channels
        cheap, dear = sorted((float(found[5]), float(found[7])))
        assert cheap < 1e-3 * dear and dear > found.median()
    alone = Activation().score(model, text)[1].channels
    assert min(alone[5], alone[7]) > 3 * alone.median()


def test_errors_that_the_loss_does_not_see_cost_nothing():
    """Outputs of the last layer along which the head is blind count without gradients, and not with them."""
    model = tiny(tie_word_embeddings=False)
    model.lm_head.weight.data[:, :16] = 0
    mlp = model.model.layers[-1].mlp
    mlp.down_proj.weight.data[16:, :24] = 0
    mlp.down_proj.weight.data[:16, 24:] = 0
    blind, seeing = (Refitted(by_loss=by).score(model, batches(20))[-1].channels for by in (False, True))
    ratio = [float(part[:24].median() / part[24:].median()) for part in (blind, seeing)]
    assert ratio[1] < 0.3 * ratio[0]
