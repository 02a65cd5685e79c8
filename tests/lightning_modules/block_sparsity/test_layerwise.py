"""Layer by layer against the papers' formulas written out for a whole model, and going on after an interruption."""

import pytest
import torch

from lightning_modules.block_sparsity import layerwise
from lightning_modules.block_sparsity.demotion import Ratios
from lightning_modules.block_sparsity.inputs import Moments
from lightning_modules.block_sparsity.layer_files import LayerFiles, layer_folder, remove_layers
from lightning_modules.block_sparsity.layerwise import Method, prune_layers
from lightning_modules.block_sparsity.masks import violations
from lightning_modules.block_sparsity.matrices import linear_layers
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.block_sparsity.reconstruction import Reconstruction
from lightning_modules.block_sparsity.scores.gradient import Gradient
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.scores.obs_saliency import ObsSaliency
from lightning_modules.block_sparsity.scores.ria import Ria
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.updates.obs import Obs
from tests.lightning_modules.block_sparsity.toy import batches, padded, prune, tiny_llama

CPU = torch.device("cpu")
HALF = Ratios(0.0, 1.0, 0.0)  # 50 % zeros, whatever the pattern
TIERS = Ratios(0.35, 0.35, 0.3)


def _inputs_of_layer(model, number, text):
    """What the linear layers of one decoder layer are given, by name, from whole forward passes."""
    seen = {}
    layer = model.model.layers[number]

    def add(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].flatten(0, -2))

    linear = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [m.register_forward_pre_hook(add(name)) for name, m in linear.items()]
    for batch in text:
        model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return {name: (linear[name], torch.cat(parts)) for name, parts in seen.items()}


def wanda(weight, x, pattern):
    """Sun et al.: Algorithm 1 (a metric, a sort per row or per group of four)."""
    metric = weight.abs() * x.norm(p=2, dim=0)
    keep = torch.ones_like(weight, dtype=torch.bool)
    if pattern == "unstructured":
        _, order = torch.sort(metric, dim=-1, stable=True)
        keep.scatter_(1, order[:, : int(weight.shape[1] * 0.5)], False)
        return weight * keep, keep
    n = int(pattern[-1])
    for first in range(0, weight.shape[1], n):
        part = metric[:, first : first + n]
        drop = part.topk(max(part.shape[1] - n // 2, 0), dim=1, largest=False).indices
        keep.scatter_(1, first + drop, False)
    return weight * keep, keep


def sparsegpt(weight, x, pattern, step=128, damping=0.01):
    """Frantar and Alistarh: Algorithm 1, one weight after the other."""
    w, x = weight.double().clone(), x.double()
    moments = x.T @ x
    moments += damping * moments.diag().mean() * torch.eye(len(moments), dtype=torch.float64)
    chol = torch.linalg.cholesky(torch.linalg.inv(moments)).T  # upper, chol.T @ chol = inverse
    keep = torch.ones_like(weight, dtype=torch.bool)
    for i in range(w.shape[1]):
        if pattern == "unstructured" and i % step == 0:
            part = (w[:, i : i + step] / chol.diag()[i : i + step]) ** 2
            drop = part.flatten().argsort()[: part.numel() // 2]
            keep[:, i : i + step] = torch.ones(part.numel(), dtype=torch.bool).scatter(0, drop, False).view(part.shape)
        elif pattern != "unstructured" and i % (n := int(pattern[-1])) == 0:
            part = (w[:, i : i + n] / chol.diag()[i : i + n]) ** 2
            drop = part.topk(max(part.shape[1] - n // 2, 0), dim=1, largest=False).indices
            keep.scatter_(1, i + drop, False)
        for row in range(len(w)):
            if not keep[row, i]:
                w[row, i:] -= w[row, i] / chol[i, i] * chol[i, i:]
    return (w * keep).float(), keep


def _by_the_paper(method, pattern, text, sequential=True):
    model, masks = tiny_llama(), {}
    reference = tiny_llama()
    with torch.no_grad():
        for number in range(2):
            source = model if sequential else reference
            for name, (matrix, x) in _inputs_of_layer(source, number, text).items():
                matrix = model.model.layers[number].get_submodule(name)
                found, masks[f"model.layers.{number}.{name}"] = method(matrix.weight, x, pattern)
                matrix.weight.copy_(found)
    return model, masks


@pytest.mark.parametrize("statistics", ["sequential", "dense"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_wanda_is_the_papers_algorithm_bit_for_bit(pattern, statistics):
    text, model = batches(3), tiny_llama()
    pruner = Pruner(model, block=8, k=6, pattern=pattern)
    prune(model, pruner, HALF, Wanda(), text, statistics=statistics)
    wanted, masks = _by_the_paper(wanda, pattern, text, statistics == "sequential")
    for name, keep in pruner.keep.items():
        assert torch.equal(keep, masks[name])
        assert torch.equal(pruner.matrices[name].weight, wanted.get_submodule(name).weight)


def test_two_of_four_throughout_is_the_same_as_tiers_and_as_a_pattern():
    masks = []
    for pattern in ("tiers", "2:4"):
        model = tiny_llama()
        pruner = Pruner(model, block=8, k=6, pattern=pattern)
        prune(model, pruner, HALF, Wanda(), batches(3), update=Obs())
        masks.append({name: keep.clone() for name, keep in pruner.keep.items()})
    assert all(torch.equal(keep, masks[1][name]) for name, keep in masks[0].items())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_sparsegpt_is_the_papers_algorithm(pattern):
    text, model = batches(6, rows=4), tiny_llama()
    pruner = Pruner(model, block=8, k=6, pattern=pattern)
    prune(model, pruner, HALF, ObsSaliency(), text, update=Obs(step=16))
    wanted, masks = _by_the_paper(lambda w, x, p: sparsegpt(w, x, p, step=16), pattern, text)
    for name, keep in pruner.keep.items():
        assert torch.equal(keep, masks[name])
        torch.testing.assert_close(
            pruner.matrices[name].weight, wanted.get_submodule(name).weight, rtol=1e-3, atol=1e-5
        )


def test_pruned_layers_below_change_what_the_next_one_keeps():
    masks = {}
    for statistics in ("sequential", "dense"):
        model = tiny_llama()
        pruner = Pruner(model, block=8, k=6)
        prune(model, pruner, TIERS, Wanda(), batches(3), statistics=statistics)
        masks[statistics] = {name: keep.clone() for name, keep in pruner.keep.items()}
    same = {name: torch.equal(keep, masks["dense"][name]) for name, keep in masks["sequential"].items()}
    assert all(found for name, found in same.items() if "layers.0" in name)
    assert not all(found for name, found in same.items() if "layers.1" in name)


@pytest.mark.parametrize(("statistics", "passes"), [("dense", [3, 3]), ("sequential", [6, 3])])
def test_dense_statistics_take_one_pass_of_each_layer_and_sequential_ones_a_second(statistics, passes):
    model, counts = tiny_llama(), [0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    prune(model, Pruner(model, block=8, k=6), HALF, Wanda(), batches(3), update=Obs(), statistics=statistics)
    assert counts == passes  # nothing is asked of the last layer's output


@pytest.mark.parametrize("score", [Wanda(), Magnitude(), Ria(), ObsSaliency()], ids=repr)
@pytest.mark.parametrize("scope", ["matrix", "global", "band"])
def test_iterations_with_updates_are_nested_and_held(score, scope):
    model = tiny_llama()
    pruner = Pruner(model, block=8, k=6, scope=scope)
    for ratios in (Ratios(0.7, 0.2, 0.1), TIERS):
        before = {name: keep.clone() for name, keep in pruner.keep.items()}
        errors = prune(model, pruner, ratios, score, batches(3), update=Obs())
        assert all(not (keep & ~before[name]).any() for name, keep in pruner.keep.items())
        assert violations(pruner.matrices, pruner.keep) == 0
        assert set(errors.matrices) == set(pruner.matrices)
    for tiers in pruner.tiers.values():
        tiers.check()
    found = pruner.ratios()
    assert (found.dense, found.topk) == pytest.approx((0.35, 0.3), abs=0.1)
    assert {len(q) for q in pruner.quantiles.values()} == {5}


def test_unstructured_iterations_with_updates_are_nested_too():
    model = tiny_llama()
    with torch.no_grad():
        for matrix in linear_layers(model).values():  # rows of unlike size, among which an update chooses
            matrix.weight.mul_(torch.logspace(-1, 1, len(matrix.weight))[:, None])
    pruner = Pruner(model, block=8, k=6, pattern="unstructured")
    for ratios in (Ratios(0.9, 0.1, 0.0), Ratios(0.8, 0.1, 0.1)):
        before = {name: keep.clone() for name, keep in pruner.keep.items()}
        prune(model, pruner, ratios, Wanda(), batches(3), update=Obs())
        assert all(not (keep & ~before[name]).any() for name, keep in pruner.keep.items())
        wanted = 0.5 * ratios.mid_2_4 + (1 - 6 / 64) * ratios.topk
        assert pruner.sparsity()["sparsity"] == pytest.approx(wanted, abs=0.005)


def test_all_matrices_compete_by_the_scores_of_the_model_as_it_is():
    model = tiny_llama()
    with torch.no_grad():
        for matrix in Pruner(model, block=8, k=6).matrices.values():
            matrix.weight.mul_(1e-3 if matrix.in_features == 42 else 1)
    pruner = Pruner(model, block=8, k=6, scope="global")
    prune(model, pruner, Ratios(0.7, 0.2, 0.1), Wanda(), batches(3))
    counts = {name: tiers.counts() for name, tiers in pruner.tiers.items()}
    assert all(dense == 0 for name, (dense, _, _) in counts.items() if "down_proj" in name)
    assert all(topk == 0 for name, (_, _, topk) in counts.items() if "down_proj" not in name)


def test_padding_has_no_part_in_an_update():
    batch, weights = batches(1, rows=1, tokens=12)[0], []
    for text in ({name: part[:, :9] for name, part in batch.items()}, padded(batch, [9], "left")):
        model = tiny_llama()
        prune(model, Pruner(model, block=8, k=6), TIERS, Wanda(), [text], update=Obs())
        weights.append(list(model.parameters()))
    for plain, filled in zip(*weights, strict=True):
        torch.testing.assert_close(plain, filled, rtol=1e-3, atol=1e-5)


def test_matrices_that_share_their_inputs_and_scores_and_updates_share_the_factors(monkeypatch):
    """Two an input, of M and of its inverse; and the result is that of factors made for each matrix alone."""

    def run():
        model, done = tiny_llama(), []
        pruner = Pruner(model, block=8, k=6)
        factor = torch.linalg.cholesky
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "cholesky", lambda *a, **k: done.append(1) or factor(*a, **k))
            prune(model, pruner, TIERS, ObsSaliency(), batches(6, rows=4), update=Obs())
        return model, len(done)

    shared, factors = run()
    assert factors == 2 * 2 * 4  # layers, factors, inputs: of q/k/v, o, gate/up and down
    keeping = Moments._factored
    monkeypatch.setattr(Moments, "_factored", lambda m, share: m._factors.clear() or keeping(m, share))
    alone, factors = run()
    assert factors == 2 * 7 * 3  # one for a score, two for an update
    assert all(torch.equal(a, b) for a, b in zip(shared.parameters(), alone.parameters(), strict=True))


def test_factors_are_those_of_the_formula():
    x = torch.randn(100, 24, generator=torch.Generator().manual_seed(0))
    moments = Moments(x.T @ x)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.damped(0.01)))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    for _ in range(2):
        assert torch.equal(moments.inverse_diagonal(0.01), inverse.diagonal())
        assert torch.equal(moments.inverse_upper(0.01), upper)
    assert not torch.equal(moments.inverse_diagonal(0.02), inverse.diagonal())


class _Stopped(Exception):
    pass


METHODS = [
    Method(Wanda(), update=Obs()),
    Method(Wanda(), "dense"),
    Method(Magnitude(), reconstruction=Reconstruction(2, 1e-3)),
    Method(Gradient()),
]


@pytest.mark.parametrize("method", METHODS, ids=["updated", "dense", "learning", "gradient"])
@pytest.mark.parametrize("pattern", ["tiers", "2:4"])
def test_an_interrupted_pruning_goes_on_after_its_last_layer_and_ends_the_same(method, pattern, tmp_path, monkeypatch):
    folder, cut = layer_folder(tmp_path / "out"), layerwise._cut
    looked: list[str] = []

    @torch.no_grad()
    def run(stop="", change=lambda model: None):
        model = tiny_llama()
        change(model)
        pruner = Pruner(model, block=8, k=6, pattern=pattern)

        def counted(name, *rest):
            if stop in name.split("."):
                raise _Stopped
            looked.append(name)
            return cut(name, *rest)

        monkeypatch.setattr(layerwise, "_cut", counted)
        prune_layers(model, pruner, TIERS, method, batches(3), CPU, folder)
        return model, pruner

    wanted = run()
    remove_layers(folder)
    assert not folder.exists()
    with pytest.raises(_Stopped):
        run(stop="1")
    looked.clear()
    run(change=lambda model: model.model.embed_tokens.weight.mul_(1.01))  # what layers are given counts, too
    assert any("layers.0." in name for name in looked)
    remove_layers(folder)
    with pytest.raises(_Stopped):
        run(stop="1")
    looked.clear()
    found = run()
    assert looked and all("layers.1." in name for name in looked)
    for mine, other in zip(found[0].parameters(), wanted[0].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert all(torch.equal(keep, wanted[1].keep[name]) for name, keep in found[1].keep.items())
    assert found[1].quantiles == wanted[1].quantiles


def test_layers_that_were_scored_by_another_models_gradients_are_made_again(tmp_path):
    def masks(folder, scale=1.0):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(scale)
        pruner = Pruner(model, block=8, k=6)
        prune_layers(model, pruner, TIERS, Method(Gradient()), batches(3), CPU, folder)
        return pruner.keep

    masks(tmp_path / "layers")
    found, wanted = masks(tmp_path / "layers", -3.0), masks(None, -3.0)
    assert all(torch.equal(keep, wanted[name]) for name, keep in found.items())


def test_layers_of_other_weights_text_or_settings_or_damaged_ones_are_made_again(tmp_path):
    text, weights = [torch.arange(4)], {"w": torch.ones(3)}

    def kept(about="a", text=text, weights=weights):
        return LayerFiles(tmp_path, about, text).next(weights)

    assert kept() is None
    files = LayerFiles(tmp_path, "a", text)
    files.next(weights)
    files.write({"w": torch.zeros(3)})
    assert torch.equal(kept()["w"], torch.zeros(3))
    assert kept(about="b") is None and kept(text=[torch.arange(1, 5)]) is None
    assert kept(weights={"w": torch.full((3,), 2.0)}) is None
    path = next(tmp_path.glob("*.layer"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert kept() is None
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    assert kept() is None
    path.write_bytes(whole)
    assert kept() is not None
    (tmp_path / "mine.txt").write_text("not a layer")
    remove_layers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_layers_that_hide_what_they_are_given_are_refused():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(batches(1)[0]["input_ids"])
    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.self_attn\.q_proj .*compiled"):
        prune(model, Pruner(model, block=8, k=6), HALF, Wanda(), batches(1))


def test_what_cannot_be_updated_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: scores are not finite"):
        prune(model, Pruner(model, block=8, k=6, pattern="unstructured"), HALF, Wanda(), batches(1))
    options = {"scope": "global", "matrix_relative": True}
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: scores are not finite"):
        prune(model, Pruner(model, block=8, k=6, **options), TIERS, Magnitude())
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf  # what follows it is given Inf
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: the calibration statistics have NaN"):
        prune(model, Pruner(model, block=8, k=6, scope="global"), TIERS, ObsSaliency(), batches(1))
    with pytest.raises(ValueError, match="calibration"):
        prune(tiny_llama(), Pruner(tiny_llama(), block=8, k=6), HALF, Wanda(), [])
