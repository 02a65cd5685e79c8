"""Compensation against the same thing done slowly: whole models, in float64, and torch.linalg.lstsq on their rows."""

import copy

import pytest
import torch

from common.variants import variants
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.compensation.bias import Bias
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.compensation.rotation import Rotation
from lightning_modules.structured_pruning.compensation.unchanged import Unchanged
from lightning_modules.structured_pruning.layers import shape_of
from lightning_modules.structured_pruning.moments import Matrix, Moments
from lightning_modules.structured_pruning.needs import amount, check_tokens, most_inputs
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.refitted import check_refitted, put_refitted
from lightning_modules.structured_pruning.refitting import compensate, refit
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.structured_pruning.toy import DROPPED, KEPT, batches, plan_for, tiny, two_samples

CPU = torch.device("cpu")
FIRST = [LayerPlan([], []), *KEPT[1:]]  # the dense model's layer before is not in the sliced one
BIASED = {"attention_bias": True, "mlp_bias": True}
MODELS = [("llama", {}), ("llama", BIASED), ("qwen2", {}), ("mistral", {}), ("llama", {"tie_word_embeddings": True})]
NAMES = ["llama", "llama with biases", "qwen2", "mistral", "tied"]
FIXED = 1.0  # the only damping, so that nothing is chosen


def _seen(model, batch, layer: int) -> dict[str, torch.Tensor]:
    """What tokens give a layer, its o_proj and its down_proj, and what its attention and MLP give, in a run."""
    block, found = model.model.layers[layer], {}

    def keep(name, values):
        found[name] = values.detach().double().flatten(0, -2)

    hooks = [
        block.input_layernorm.register_forward_pre_hook(lambda m, a: keep("hidden", a[0])),
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: keep("heads", a[0])),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a: keep("channels", a[0])),
        block.self_attn.register_forward_hook(lambda m, a, out: keep("attention", out[0])),
        block.mlp.register_forward_hook(lambda m, a, out: keep("mlp", out)),
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _damped(x, y, weight, bias, damping, counts):
    """Σ w ‖y − W x − b‖² + λ ‖W − weight‖² at its least, from stacked rows: no normal equations."""
    means = [(counts * part).sum(0) / counts.sum() if bias is not None else torch.zeros(()) for part in (x, y)]
    x_, y_ = ((part - mean) * counts.sqrt() for part, mean in zip((x, y), means, strict=True))
    scale = (damping * x_.square().sum(0).mean()).sqrt()
    rows = torch.cat([x_, scale * torch.eye(x.shape[1], dtype=torch.float64)])
    fitted = torch.linalg.lstsq(rows, torch.cat([y_, scale * weight.T])).solution.T
    return fitted, None if bias is None else means[1] - fitted @ means[0]


def _slowly(dense, plan, text, damping, follow, relative, left):
    """Refit by running whole models: the dense one says what a layer should lead to, or its layer in that place.

    ``left`` are layers and matrices that stay as they are, because cross-validation refused.
    """
    sliced = slice_model(dense, plan).double()
    whole = copy.deepcopy(dense).double()
    kept = [i for i, layer in enumerate(plan.layers) if not layer.dropped]
    cut = kept[0] > 0
    for new, (old, after) in enumerate(zip(kept, [*kept[1:], len(plan.layers)], strict=True)):
        block, shape = sliced.model.layers[new], shape_of(dense.model.layers[old])
        fewer = len(plan.layers[old].groups) < shape.groups
        if not fewer and len(plan.layers[old].channels) == shape.channels and after == old + 1 and not (follow and cut):
            continue
        model, first = whole, old
        if not follow:
            model, first = copy.deepcopy(sliced), new
            model.model.layers = torch.nn.ModuleList([*sliced.model.layers[:new], *whole.model.layers[old:after]])
            model.config.num_hidden_layers = len(model.model.layers)
        seen, last = ([_seen(model, b, i) for b in text] for i in (first, first + after - old - 1))
        goals = (
            torch.cat([one["hidden"] + one["attention"] for one in seen]),
            torch.cat([one["hidden"] + one["attention"] + one["mlp"] for one in last]),
        )
        counts = 1 / goals[1].square().mean(1, keepdim=True) if relative else torch.ones(len(goals[1]), 1)
        linears = (("heads", block.self_attn.o_proj), ("channels", block.mlp.down_proj))
        for name, linear in linears[0 if fewer or (follow and cut) else 1 :]:
            given = [_seen(sliced, b, new) for b in text]
            x, before, attention = (torch.cat([one[k] for one in given]) for k in (name, "hidden", "attention"))
            y = goals[0] - before if name == "heads" else goals[1] - before - attention
            if (old, name) in left:
                continue
            weight, bias = _damped(x, y, linear.weight.detach(), linear.bias, damping, counts.double())
            linear.weight.data = weight
            if bias is not None:
                linear.bias.data = bias
        cut = True
    return sliced


@pytest.mark.parametrize("kept", [KEPT, DROPPED, FIRST], ids=["parts", "a whole layer", "the first layer"])
@pytest.mark.parametrize(("name", "fields"), MODELS, ids=NAMES)
@pytest.mark.parametrize(("follow", "relative"), [(True, True), (False, False)], ids=["dense", "layer"])
def test_every_layer_is_the_least_squares_solution_of_its_inputs_and_outputs(name, fields, kept, follow, relative):
    dense, text = tiny(name, torch.float64, **fields), batches(5, 8)
    plan = plan_for(dense, kept)
    found = slice_model(dense, plan)
    fits = refit(dense, found, plan, text, LeastSquares(damping=[FIXED], follow=follow, relative=relative)).fits
    names = {"self_attn.o_proj": "heads", "mlp.down_proj": "channels"}
    left = {(fit["layer"], names[fit["matrix"]]) for fit in fits if fit["setting"] is None}
    wanted = _slowly(dense, plan, text, FIXED, follow, relative, left)
    changed = 0
    for (parameter, one), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5, msg=lambda text, p=parameter: f"{p}: {text}")
    sliced = slice_model(dense, plan)
    for one, other in zip(found.parameters(), sliced.parameters(), strict=True):
        changed += not torch.equal(one, other)
    assert changed >= 3


def _refitted(compensation, text, kept=KEPT, dtype=torch.float64, name="llama", **fields):
    dense = tiny(name, dtype, **fields)
    sliced = slice_model(dense, plan_for(dense, kept))
    return sliced, *compensate(dense, sliced, plan_for(dense, kept), text, compensation)


def _problem(tokens=400, inputs=12, outputs=5, noise=0.1, seed=0):
    """Rows x and y, and a matrix that is not the best for them."""
    draw = torch.Generator().manual_seed(seed)
    x, truth, off, e = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((tokens, inputs), (outputs, inputs), (outputs, inputs), (tokens, outputs))
    )
    return x, x @ truth.T + noise * e + 3, Matrix(truth + off, torch.zeros(outputs, dtype=torch.float64))


def _moments(x, y, count=1) -> list[Moments]:
    found = [Moments.none(x.shape[1], y.shape[1], CPU) for _ in range(count)]
    for i, part in enumerate(found):
        part.add(x[i::count], y[i::count], x.new_ones(len(x[i::count])))
    return found


def test_moments_know_the_error_of_any_matrix():
    x, y, matrix = _problem()
    (whole,) = _moments(x, y)
    for one in (matrix, Matrix(matrix.weight, None), Matrix(matrix.weight, y.mean(0))):
        expected = (y - x @ one.weight.T - (0 if one.bias is None else one.bias)).square().sum()
        assert whole.error(one) == pytest.approx(float(expected), rel=1e-5)
    first, second = _moments(x, y, 2)
    assert (first + second).error(matrix) == pytest.approx(whole.error(matrix), rel=1e-6)
    assert (whole - first).error(matrix) == pytest.approx(second.error(matrix), rel=1e-5)
    assert (first + second).weight == 400 and (whole - first).weight == 200


def test_least_squares_is_nearest_among_neighbours_with_and_without_bias():
    x, y, matrix = _problem()
    (moments,) = _moments(x, y)
    for start in (matrix, Matrix(matrix.weight, None)):
        found = LeastSquares(damping=[1e-9]).solve(start, moments, 1e-9)
        rows = x if start.bias is None else torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(rows, y).solution.T
        torch.testing.assert_close(found.weight, solution[:, :12], rtol=1e-4, atol=1e-4)
        if start.bias is not None:
            torch.testing.assert_close(found.bias, solution[:, 12], rtol=1e-4, atol=1e-4)
    heavy = LeastSquares(damping=[1e9]).solve(matrix, moments, 1e9)
    torch.testing.assert_close(heavy.weight, matrix.weight, rtol=1e-6, atol=1e-6)


def test_rotation_is_orthogonal_and_no_other_rotation_is_nearer():
    x, y, matrix = _problem(inputs=9)
    (moments,) = _moments(x, y)
    found = Rotation().solve(Matrix(matrix.weight, None), moments, None)
    turn = found.weight @ torch.linalg.pinv(matrix.weight)
    torch.testing.assert_close(turn @ turn.T, torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0)
    best = moments.error(found)
    assert best < moments.error(Matrix(matrix.weight, None))
    draw = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1.0):
        for _ in range(20):
            skew = size * torch.randn(5, 5, generator=draw, dtype=torch.float64)
            other = torch.linalg.matrix_exp(skew - skew.T) @ found.weight
            assert moments.error(Matrix(other, None)) > best


def test_a_bias_takes_the_mean_of_what_is_missing():
    sliced, plan, found = _refitted(Bias(), batches(20))
    assert sliced.config.attention_bias and sliced.config.mlp_bias
    names = {name for name, fit in zip(found.tensors, found.fits, strict=False)}
    assert names and all(name.endswith("bias") or "o_proj" in name or "down_proj" in name for name in found.tensors)
    dense = tiny(dtype=torch.float64)
    block, kept = sliced.model.layers[1], plan.layers[1]
    text = batches(20)
    mixed = copy.deepcopy(sliced)
    mixed.model.layers[1] = dense.model.layers[1]
    given = torch.cat([_seen(mixed, batch, 1)["heads"] for batch in text]).mean(0)
    gone = torch.ones(48, dtype=torch.bool)
    gone[[head * 6 + i for head in kept.queries(2) for i in range(6)]] = False
    expected = dense.model.layers[1].self_attn.o_proj.weight[:, gone] @ given[gone]
    torch.testing.assert_close(block.self_attn.o_proj.bias, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(block.self_attn.q_proj.bias, torch.zeros_like(block.self_attn.q_proj.bias))


@pytest.mark.parametrize("compensation", [one for cls in variants(Compensation) for one in cls.examples()], ids=repr)
def test_every_compensation_lowers_errors_and_changes_nothing_but_what_it_names(compensation):
    text = batches(20)
    sliced, plan, found = _refitted(compensation, text)
    again, _, _ = _refitted(compensation, text)
    assert model_hash(again) == model_hash(sliced)
    dense = tiny(dtype=torch.float64)
    bare = slice_model(dense, plan)
    described = plan.settings["compensation"]
    assert described["name"] == compensation.name and described["tensors"].keys() == found.tensors.keys()
    check_refitted(bare, sliced, plan)
    assert all(fit["refitted"] <= fit["left"] for fit in found.fits)
    assert bool(found.fits) == compensation.refits
    put_refitted(bare, found.tensors)
    assert model_hash(bare) == model_hash(sliced)
    assert all(p.grad is None for p in sliced.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in [*sliced.modules(), *dense.modules()])


def test_a_token_that_weighs_twice_is_as_two():
    x, y, matrix = _problem()
    weights = 1.0 + (torch.arange(400) % 3 == 0)
    twice = weights == 2
    weighted, repeated = Moments.none(12, 5, CPU), Moments.none(12, 5, CPU)
    weighted.add(x, y, weights)
    repeated.add(torch.cat([x, x[twice]]), torch.cat([y, y[twice]]), torch.ones(400 + int(twice.sum())))
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), rtol=1e-5, atol=1e-4)
    assert weighted.weight == repeated.weight
    assert weighted.error(matrix) == pytest.approx(repeated.error(matrix), rel=1e-5)


@pytest.mark.parametrize("compensation", [LeastSquares(damping=[1e-8, 1e-4]), Rotation()], ids=lambda c: c.name)
def test_text_that_is_too_little_to_learn_from_changes_nothing(compensation):
    """The matrix is the true one and outputs are noisy: a fit is nearer on its own text, and farther on other text."""
    x, y, _ = _problem(tokens=28, inputs=12, outputs=12, noise=6.0)
    exact = _problem(tokens=28, inputs=12, outputs=12, noise=0.0)[1]
    true = Matrix(torch.linalg.lstsq(x, exact - 3).solution.T, None)
    folds = _moments(x, y - 3, 2)
    whole = folds[0] + folds[1]
    assert whole.error(compensation.solve(true, whole, compensation.settings[0])) < 0.9 * whole.error(true)
    fit = compensation.fit(true, folds)
    assert fit.matrix is None and fit.setting is None and fit.refitted == fit.left
    much = _problem(tokens=4000, inputs=12, outputs=12)
    assert compensation.fit(Matrix(much[2].weight, None), _moments(much[0], much[1] - 3, 4)).matrix is not None


def test_the_damping_that_suits_text_held_out_is_chosen():
    x, y, matrix = _problem(tokens=40, inputs=30, noise=4.0)
    compensation = LeastSquares(damping=[1e-6, 1e-1, 1e2])
    folds = _moments(x, y - 3, 4)
    start = Matrix(matrix.weight, None)
    errors = []
    for damping in compensation.damping:
        error = 0.0
        for i, held_out in enumerate(folds):
            rest = [fold for j, fold in enumerate(folds) if j != i]
            error += held_out.error(compensation.solve(start, rest[0] + rest[1] + rest[2], damping))
        errors.append(error)
    fit = compensation.fit(start, folds)
    assert fit.setting == compensation.damping[errors.index(min(errors))] != 1e-6
    assert fit.refitted == pytest.approx(min(errors) / sum(float(fold.yy) for fold in folds))


def test_padding_and_neighbours_in_a_row_teach_nothing():
    found = []
    for name, batch in two_samples().items():
        kind = LeastSquares(damping=[FIXED], folds=2)
        kind.fewest_tokens = lambda inputs, outputs: 1
        text = [batch, batch] if name == "packed" else [batch]
        found.append(_refitted(kind, text)[0])
    _, right, left = found
    for one, other in zip(right.parameters(), left.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(right.parameters(), _bare().parameters(), strict=True))


def _bare():
    dense = tiny(dtype=torch.float64)
    return slice_model(dense, plan_for(dense))


def test_half_precision_is_fitted_in_double_and_saved_in_half():
    sliced, _, found = _refitted(LeastSquares(), batches(20), dtype=torch.bfloat16)
    wanted, _, _ = _refitted(LeastSquares(), batches(20))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    one, other = (model.model.layers[1].self_attn.o_proj.weight.double() for model in (sliced, wanted))
    assert (one - other).norm() < 0.05 * other.norm()


def test_too_few_tokens_are_refused_with_the_number_that_is_needed():
    shapes = [shape_of(layer) for layer in _bare().model.layers]
    assert most_inputs(shapes) == 48
    check_tokens(LeastSquares(), 48, 32, tokens=64, rows=4)
    with pytest.raises(
        ValueError, match=r"48 inputs needs 64 tokens .* there are 63 in 7; set calibration_blocks to at least 8"
    ):
        check_tokens(LeastSquares(), 48, 32, tokens=63, rows=7)
    with pytest.raises(ValueError, match=r"needs 96 tokens .* in 2 blocks or more"):
        check_tokens(LeastSquares(folds=2), 48, 32, tokens=95, rows=7)
    with pytest.raises(ValueError, match=r"4 blocks or more.* in 3; set calibration_blocks to at least 4"):
        check_tokens(Bias(), 48, 32, tokens=1000, rows=3)
    with pytest.raises(ValueError, match=r"rotation of .* needs 43 tokens"):
        check_tokens(Rotation(), 48, 32, tokens=42, rows=8)
    with pytest.raises(ValueError, match="least_squares of matrices with 48 inputs needs 64 tokens"):
        _refitted(LeastSquares(), [{k: v[:, :15] for k, v in batch.items()} for batch in batches(2)])
    assert amount([two_samples()["left"], batches(1)[0]]) == (16 + 40, 4)


def test_how_wide_the_widest_matrix_will_be_at_least_is_known_before_there_is_a_plan():
    shapes = [shape_of(layer) for layer in tiny().model.layers]
    total = sum(shape.parameters for shape in shapes)
    alike = [LayerPlan([0, 1, 2, 3], list(range(40)))] * 4
    for kept in (KEPT, DROPPED, alike):
        left = [shape_of(layer) for layer in slice_model(tiny(), plan_for(tiny(), kept)).model.layers]
        bound = most_inputs(shapes, total - sum(shape.parameters for shape in left))
        assert 0 < bound <= most_inputs(left)
    assert bound == 40  # columns of attention are as dear as channels here
    assert most_inputs(shapes) == most_inputs(shapes, 1) == 48


def test_a_bias_that_the_class_does_not_know_is_refused():
    for name in ("qwen2", "mistral"):
        with pytest.raises(ValueError, match=f"{name} has no bias on o_proj and down_proj"):
            _refitted(LeastSquares(bias=True), batches(20), name=name)


def test_arguments_are_checked():
    for wrong, message in (
        ({"damping": []}, "damping must be positive"),
        ({"damping": [0.0]}, "damping must be positive"),
        ({"folds": 1}, "folds must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            LeastSquares(**wrong)
    assert not Unchanged().refits


def test_a_tensor_changed_later_is_named():
    sliced, plan, found = _refitted(LeastSquares(), batches(20))
    bare = _bare()
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        changed = copy.deepcopy(sliced)
        dict(changed.named_parameters())[name].data.view(-1)[3] += 1e-9
        what = "compensation has made" if name in found.tensors else "not that of the slice"
        with pytest.raises(ValueError, match=f"verify: {name} .*{what}.*weights were changed after pruning"):
            check_refitted(bare, changed, plan)
    rounded = copy.deepcopy(sliced)
    weight = rounded.model.layers[0].mlp.up_proj.weight.data
    weight.view(-1)[3] += weight.abs().max() * 2e-16
    check_refitted(bare, rounded, plan, rounding=True)
    weight.view(-1)[3] += weight.abs().max() * 2e-15
    with pytest.raises(ValueError, match="not that of the slice"):
        check_refitted(bare, rounded, plan, rounding=True)
    other = {name: tensor[:, :-1] for name, tensor in found.tensors.items()}
    with pytest.raises(ValueError, match="does not fit this model"):
        put_refitted(bare, other)


def test_a_layer_kept_whole_is_left_alone_unless_the_next_is_dropped():
    whole = LayerPlan([0, 1, 2, 3], list(range(48)))
    _, _, found = _refitted(LeastSquares(), batches(20), [whole, whole, LayerPlan([], []), KEPT[1]])
    assert [(fit["layer"], fit["matrix"]) for fit in found.fits] == [
        (1, "mlp.down_proj"),
        (3, "self_attn.o_proj"),
        (3, "mlp.down_proj"),
    ]
