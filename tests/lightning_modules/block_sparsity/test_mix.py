"""The mix that loses least in so many bytes, against every mix there is."""

import itertools
from functools import partial

import pytest
import torch

from lightning_modules.block_sparsity.demotion import Ratios, demote, demote_to
from lightning_modules.block_sparsity.matrices import linear_layers
from lightning_modules.block_sparsity.mix import Mix, best_mix, block_losses, choices, in_bands
from lightning_modules.block_sparsity.packing import DTYPES, pack
from lightning_modules.block_sparsity.pruner import Pruner, packed_bits, padding
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.sensitivity import output_sensitivity
from lightning_modules.block_sparsity.tiers import TierMap, most_topk
from lightning_modules.block_sparsity.updates.obs import Obs
from lightning_modules.perplexity import next_token_nll
from tests.lightning_modules.block_sparsity.toy import batches, prune, scored, tiny_llama

CPU = torch.device("cpu")


def _tiers(shape=(16, 32), name="m"):
    return TierMap(name, shape, 8, 6, CPU)


def _scores(shape=(16, 32), seed=0):
    draw = torch.Generator().manual_seed(seed)
    heavy = torch.rand(shape, generator=draw).pow(6)  # some weights of a block are most of it
    return heavy * torch.rand(shape[0] // 8, shape[1] // 8, generator=draw).repeat_interleave(8, 0).repeat_interleave(
        8, 1
    )


def _ratios(map_rc):
    return Ratios(*(torch.bincount(map_rc.flatten().long(), minlength=3) / map_rc.numel()).tolist())


def _loss_by_hand(block, tier, k):
    kept = block.clone()
    if tier:
        for row in range(8):
            for first in range(0, 8, 4):
                group = kept[row, first : first + 4]
                group[group.argsort()[:2]] = 0
    if tier == 2:
        flat = kept.flatten()
        flat[flat.argsort()[:-k]] = 0
    return float((block**2).sum() - (kept**2).sum())


def test_losses_are_the_squares_of_what_goes():
    scores, tiers = _scores(), _tiers()
    found, whole = block_losses(scored(scores), tiers, (6, 20))
    assert whole == pytest.approx(float(scores.pow(2).sum()))
    for n, (row, column) in enumerate(itertools.product(range(2), range(4))):
        block = scores[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        wanted = [0.0, _loss_by_hand(block, 1, 0), _loss_by_hand(block, 2, 6), _loss_by_hand(block, 2, 20)]
        torch.testing.assert_close(found[n], torch.tensor(wanted))


def test_no_other_mix_of_as_few_bytes_loses_less():
    scores, tiers = _scores(), _tiers()
    bits = [packed_bits(one, 8, 6) for one in (Ratios(1, 0, 0), Ratios(0, 1, 0), Ratios(0, 0, 1))]
    losses, whole = block_losses(scored(scores), tiers, (6,))
    every = [(sum(bits[t] for t in mix) / 8, sum(float(losses[n, t]) for n, t in enumerate(mix)))
             for mix in itertools.product(range(3), repeat=8)]  # fmt: skip
    for target in (4.0, 8.0, 12.0):
        found = best_mix({"m": scored(scores)}, {"m": tiers}, Mix(target), (6,))
        assert found.bits <= target + 1e-9
        best = min(loss for spent, loss in every if spent <= found.bits + 1e-9)
        assert found.loss == pytest.approx(best / whole)
        assert packed_bits(_ratios(found.maps["m"]), 8, 6) == pytest.approx(found.bits)
        step = max(bits) - min(bits)  # what one block more would take
        assert found.bits > target - step / 8 - 1e-9


@pytest.mark.parametrize(("values", "bands"), [("float16", False), ("float32", False), ("int8", False), ("int8", True)])
def test_bits_are_those_of_the_packed_blocks_whole_ones_at_the_edges_included(values, bands):
    shapes = {"even": (32, 64), "edges": (44, 37)}
    scores = {name: scored(_scores((48, 64), seed=2)[:r, :c].contiguous()) for name, (r, c) in shapes.items()}
    most = packed_bits(Ratios(1, 0, 0), 8, 6, values, bands)
    for among in ("matrix", "global"):
        tiers = {name: _tiers(shape, name) for name, shape in shapes.items()}
        found = best_mix(scores, tiers, Mix(0.6 * most, among, values=values, bands=bands), (6,))
        packed = {}
        for name, one in tiers.items():
            demote_to(scores[name], one, found.maps[name])
            parts = pack(torch.ones(one.shape) * one.keep_RC, one, DTYPES[values])
            # the band form has 16 bits a block in the map's place; bands need not be alike to be counted
            size = sum(t.nbytes for part, t in parts.items() if part != "map") + one.map_rc.numel() * (
                2 if bands else 0.25
            )
            packed[name] = 8 * size
        weights = {name: one.keep_RC.numel() for name, one in tiers.items()}
        total = sum(packed.values()) / sum(weights.values())
        assert total == pytest.approx(found.bits) and 0.55 * most < total <= 0.6 * most + 1e-6
        if among == "matrix":
            assert all(packed[name] / weights[name] <= 0.6 * most + 1e-6 for name in packed)


def test_all_together_take_from_those_that_lose_least():
    scores = {"sharp": _scores().pow(4), "flat": torch.ones(16, 32) + 0.1 * _scores(seed=1)}
    tiers = {name: _tiers(name=name) for name in scores}
    alone, together = (
        best_mix({n: scored(s) for n, s in scores.items()}, tiers, Mix(10.0, among), (6,))
        for among in ("matrix", "global")
    )
    assert together.loss < alone.loss
    assert _ratios(together.maps["sharp"]).dense < _ratios(alone.maps["sharp"]).dense
    assert packed_bits(_ratios(alone.maps["flat"]), 8, 6) <= 10
    heavy = best_mix(
        {"sharp": scored(scores["sharp"]).weighted(torch.full((16,), 1e6)), "flat": scored(scores["flat"])},
        tiers, Mix(10.0, "global"), (6,),
    )  # fmt: skip
    assert _ratios(heavy.maps["sharp"]).dense > _ratios(together.maps["sharp"]).dense


def test_k_is_the_one_that_loses_least_and_none_is_larger_than_two_of_four():
    scores, tiers = {"m": scored(_scores((64, 64)))}, {"m": _tiers((64, 64))}
    losses = {k: best_mix(scores, tiers, Mix(7.6), (k,)).loss for k in choices(8)}
    found = best_mix(scores, tiers, Mix(7.6), choices(8))
    assert best_mix(scores, tiers, Mix(2.0), choices(8)).k in choices(8)[:2]  # the others are too large
    assert found.loss == min(losses.values()) and losses[found.k] == found.loss and len(set(losses.values())) > 1
    for block in (4, 8, 16, 32, 128):
        for values in ("float16", "int8"):
            most = most_topk(block, values)
            assert all(1 <= k <= most for k in choices(block, values))
            top, half = (packed_bits(one, block, most, values) for one in (Ratios(0, 0, 1), Ratios(0, 1, 0)))
            assert top <= half < packed_bits(Ratios(0, 0, 1), block, most + 1, values)


def test_blocks_become_top_k_of_themselves_only_where_two_of_four_is_too_large():
    scores, tiers = {"m": scored(_scores((64, 64)))}, {"m": _tiers((64, 64))}
    half = packed_bits(Ratios(0, 1, 0), 8, 6)
    ks = choices(8)
    assert (best_mix(scores, tiers, Mix(half + 1), ks).maps["m"] == 2).any()
    for among in ("matrix", "global"):
        found = best_mix(scores, tiers, Mix(half + 1, among, ks), ks)
        assert not (found.maps["m"] == 2).any() and half < found.bits <= half + 1
    assert (best_mix(scores, tiers, Mix(half - 1, "matrix", ks), ks).maps["m"] == 2).any()


def test_a_mix_goes_downwards_only_and_says_when_it_cannot():
    scores, tiers = _scores((64, 64)), {"m": _tiers((64, 64))}
    demote({"m": scored(scores)}, tiers, Ratios(0.4, 0.4, 0.2))
    now = packed_bits(Ratios(*(count / 64 for count in tiers["m"].counts())), 8, 6)
    lower = best_mix({"m": scored(_scores((64, 64), 5))}, tiers, Mix(now - 1), (6,)).maps["m"]
    assert (lower >= tiers["m"].map_rc).all() and not torch.equal(lower, tiers["m"].map_rc)
    kept = tiers["m"].keep_RC.clone()
    demote_to(scored(_scores((64, 64), 5)), tiers["m"], lower)
    tiers["m"].check()
    assert torch.equal(tiers["m"].map_rc, lower) and not (tiers["m"].keep_RC & ~kept).any()
    same = best_mix({"m": scored(scores)}, tiers, Mix(now), (6,)).maps["m"]
    assert torch.equal(same, lower)  # already smaller than asked for: left as it is
    assert torch.equal(best_mix({"m": scored(scores)}, tiers, Mix(16.0), (6,)).maps["m"], lower)
    with pytest.raises(ValueError, match=r"m: the tiers .* would un-demote"):
        demote_to(scored(scores), tiers["m"], torch.zeros_like(lower))
    for among, whose in (("matrix", "m"), ("global", "all matrices")):
        wrong = rf"target_bits: no mix of tiers of {whose} takes only 1 bits per weight: 2\.\d+ is the least"
        with pytest.raises(ValueError, match=wrong):
            best_mix({"m": scored(scores)}, tiers, Mix(1.0, among), (6,))


@pytest.mark.parametrize("scope", ["matrix", "global", "band"])
def test_a_model_is_pruned_to_so_many_bits_in_iterations(scope):
    model = tiny_llama()
    pruner = Pruner(model, block=8, k=6, scope=scope)
    before, ks = 16.1, []
    for bits in (12.0, 8.0):
        target = Mix(bits, scope, choices(8) if bits == 12 else ())
        kept = {name: keep.clone() for name, keep in pruner.keep.items()}
        prune(model, pruner, target, Wanda(), batches(3), update=Obs())
        found = packed_bits(pruner.ratios(), 8, pruner.k) * padding(pruner.tiers.values())
        assert bits - (3.5 if scope == "band" else 1.0) < found <= bits + 0.01 and found < before
        assert all(not (keep & ~kept[name]).any() for name, keep in pruner.keep.items())
        before = found
        ks.append(pruner.k)
    assert ks[0] == ks[1]
    for tiers in pruner.tiers.values():
        tiers.check()
    with pytest.raises(ValueError, match="cannot have"):
        pruner.set_topk(ks[0] + 1)


@pytest.mark.parametrize("columns", [1, 4, 36])
def test_shares_of_bands_take_no_more_than_those_of_the_matrix_and_nearly_as_much(columns):
    draw = torch.Generator().manual_seed(columns)
    for weights in ([0.5, 0.4, 0.1], [0.1, 0.9, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.6, 0.0, 0.4]):
        map_rc = torch.multinomial(torch.tensor(weights), 9 * columns, True, generator=draw).view(9, columns)
        found, asked = in_bands(map_rc, partial(packed_bits, block=16, k=10)), packed_bits(_ratios(map_rc), 16, 10)
        bits = packed_bits(found, 16, 10)
        assert asked - 9 / columns < bits <= asked + 1e-3
        counts = [share * columns for share in vars(found).values()]
        assert counts == pytest.approx([round(count) for count in counts]) and sum(counts) == pytest.approx(columns)
        assert all(
            abs(a - b) < 2 / columns for a, b in zip(vars(found).values(), vars(_ratios(map_rc)).values(), strict=True)
        )


def test_the_loss_minds_an_output_as_the_square_of_its_gradient():
    model, text = tiny_llama().double(), batches(2)
    matrices = linear_layers(model)
    required = [p.requires_grad for p in model.parameters()]
    moved = pytest.MonkeyPatch()
    moved.setattr(type(model), "to", lambda *_: pytest.fail("the whole model was moved"))
    found = output_sensitivity(model, matrices, text, CPU)
    moved.undo()
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    name = "model.layers.1.mlp.gate_proj"
    for row in (0, 7):
        wanted = 0.0
        for batch, b, t in itertools.product(text, range(2), range(12)):
            y: list[torch.Tensor] = []

            def nudge(_, args, out, b=b, t=t, y=y, row=row):
                y.append(torch.zeros((), dtype=torch.float64, requires_grad=True))
                change = torch.zeros_like(out)
                change[b, t, row] = 1
                return out + y[-1] * change

            handle = matrices[name].register_forward_hook(nudge)
            loss = next_token_nll(model(batch["input_ids"]).logits, batch["labels"])[0]
            handle.remove()
            wanted += float(torch.autograd.grad(loss, y[0])[0]) ** 2
        assert float(found[name][row]) == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="at least one batch"):
        output_sensitivity(model, matrices, [], CPU)
