"""Demotion against a loop over blocks, its one direction, and what it refuses."""

import pytest
import torch

from lightning_modules.block_sparsity.demotion import Ratios, block_sums, demote, quantiles
from lightning_modules.block_sparsity.masks import groups, lowest, unstructured
from lightning_modules.block_sparsity.tiers import TierMap, pack_bits, pad, to_blocks, unpack_bits
from tests.lightning_modules.block_sparsity.toy import loop_iteration, scored

SEED_ROWS = [(0.9, 0.1, 0.0), (0.8, 0.1, 0.1), (0.65, 0.2, 0.15), (0.5, 0.3, 0.2), (0.35, 0.45, 0.2)]
SEED_SPARSITIES = [5.0, 14.6, 24.4, 34.2, 41.7]


def _tiers(shape, block=16, k=10, name="m"):
    return TierMap(name, shape, block, k, torch.device("cpu"))


def _scores(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, shape[1])


@pytest.mark.parametrize(("shape", "block", "k"), [((64, 96), 16, 10), ((44, 37), 8, 6), ((23, 50), 16, 10)])
def test_three_iterations_equal_a_loop_over_blocks(shape, block, k):
    tiers = _tiers(shape, block, k)
    for number, row in enumerate(SEED_ROWS[:3]):
        scores = _scores(shape, number)  # other scores every time, as after fine-tuning
        expected = loop_iteration(scores, tiers.map_rc, tiers.keep_RC, Ratios(*row), block, k)
        means = demote({"m": scored(scores)}, {"m": tiers}, Ratios(*row))["m"]
        assert torch.equal(tiers.map_rc, expected[0]) and torch.equal(tiers.keep_RC, expected[1])
        sums = to_blocks(pad(scores * tiers.keep_RC, block), block).sum((-1, -2))
        torch.testing.assert_close(means, sums / tiers.keep_rcbb.sum((-1, -2)))
        tiers.check()


def test_the_seeds_rows_give_the_seeds_sparsities():
    shapes = {"q": (512, 256), "k": (128, 256), "gate": (704, 256)}
    tiers = {name: _tiers(shape, name=name) for name, shape in shapes.items()}
    scores = {name: scored(_scores(shape)) for name, shape in shapes.items()}
    before = {name: t.keep_RC.clone() for name, t in tiers.items()}
    for row, percent in zip(SEED_ROWS, SEED_SPARSITIES, strict=True):
        target = Ratios(*row)
        assert 100 * target.sparsity(16, 10) == pytest.approx(percent, abs=0.06)
        demote(scores, tiers, target)
        zeros = sum(int((~t.keep_RC).sum()) for t in tiers.values())
        assert 100 * zeros / sum(r * c for r, c in shapes.values()) == pytest.approx(percent, abs=0.2)
        for name, t in tiers.items():
            assert not (t.keep_RC & ~before[name]).any()  # nested
            before[name] = t.keep_RC.clone()


@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize("target", [Ratios(0.5, 0.0, 0.5), Ratios(0.25, 0.25, 0.5), Ratios(0.0, 0.0, 1.0)], ids=repr)
def test_no_tier_has_fewer_blocks_than_none(target, blocks):
    counts = target.counts(blocks)
    assert sum(counts) == blocks and min(counts) >= 0
    tiers = _tiers((16, 16 * blocks))
    demote({"m": scored(_scores((16, 16 * blocks)))}, {"m": tiers}, target)
    assert tiers.counts() == counts


def test_a_fresh_two_of_four_block_competes_with_old_ones_on_what_it_still_has():
    scores = torch.ones(16, 64)
    scores[:, :16] = 0.9  # falls first
    tiers = _tiers((16, 64))
    demote({"m": scored(scores)}, {"m": tiers}, Ratios(0.75, 0.25, 0.0))
    assert tiers.map_rc.tolist() == [[1, 0, 0, 0]]
    scores[:, 16:32] = 0.5  # now another is worse, also by the half that it keeps, and passes the old one on its way
    scores[:, 16:32:2] = 0.6
    demote({"m": scored(scores)}, {"m": tiers}, Ratios(0.5, 0.25, 0.25))
    assert tiers.map_rc.tolist() == [[1, 2, 0, 0]]


def test_only_surviving_weights_count_in_a_two_of_four_block():
    scores = torch.ones(16, 32)
    scores[:, 0::4] = 9.0
    tiers = _tiers((16, 32))
    demote({"m": scored(scores)}, {"m": tiers}, Ratios(0.0, 1.0, 0.0))
    assert (block_sums(scored(scores), tiers) / tiers.kept_per_block()).tolist() == [[5.0, 5.0]]


def test_one_budget_over_all_matrices_takes_from_the_lowest():
    scores = {"low": torch.full((32, 32), 0.1), "high": torch.full((32, 32), 1.0)}
    tiers = {name: _tiers((32, 32), name=name) for name in scores}
    demote({n: scored(s) for n, s in scores.items()}, tiers, Ratios(0.5, 0.25, 0.25), "global")
    assert tiers["low"].counts() == (0, 2, 2) and tiers["high"].counts() == (4, 0, 0)


def test_bands_have_equally_many_blocks_of_each_tier():
    scores = _scores((64, 160)) * torch.arange(1, 65)[:, None]  # lower rows matter more
    tiers = _tiers((64, 160))
    for row in ((0.9, 0.1, 0.0), (0.5, 0.3, 0.2)):
        demote({"m": scored(scores)}, {"m": tiers}, Ratios(*row), "band")
    assert [[(band == tier).sum().item() for tier in (0, 1, 2)] for band in tiers.map_rc] == [[5, 3, 2]] * 4


def test_a_target_that_would_bring_blocks_back_is_refused_and_changes_nothing():
    tiers, scores = _tiers((64, 64)), _scores((64, 64))
    demote({"m": scored(scores)}, {"m": tiers}, Ratios(0.5, 0.25, 0.25))
    before = tiers.map_rc.clone()
    for row in ((0.75, 0.0, 0.25), (0.5, 0.5, 0.0)):
        with pytest.raises(ValueError, match="un-demote"):
            demote({"m": scored(scores)}, {"m": tiers}, Ratios(*row))
    assert torch.equal(tiers.map_rc, before)


def test_scores_that_are_not_finite_are_refused_by_the_matrix_name():
    scores = _scores((32, 32))
    scores[3, 3] = torch.nan
    with pytest.raises(ValueError, match="layer7"):
        demote({"layer7": scored(scores)}, {"layer7": _tiers((32, 32), name="layer7")}, Ratios(0.5, 0.5, 0.0))


@pytest.mark.parametrize(
    ("shape", "block", "k", "names"),
    [
        ((8, 64), 16, 10, "smaller than a block"),
        ((64, 64), 16, 97, "between 1 and 96 of the 256 weights"),
        ((64, 64), 16, 0, "topk"),
        ((64, 64), 6, 2, "multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(shape, block, k, names):
    with pytest.raises(ValueError, match=names):
        _tiers(shape, block, k)


def test_no_weight_comes_back_and_a_wrong_direction_raises():
    tiers = _tiers((16, 32))
    index, everything = (torch.tensor([0]), torch.tensor([0])), torch.ones(1, 16, 16, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="2:4"):
        tiers.demote(index, 2, everything)  # dense to top-k skips a tier
    tiers.demote(index, 1, everything & (torch.arange(16) % 4 < 2))
    kept = tiers.demote(index, 2, everything)
    assert kept.sum() == 128 and torch.equal(kept, tiers.kept(index))


def test_states_round_trip_and_others_are_refused():
    tiers, scores = _tiers((44, 37), 8, 6), _scores((44, 37))
    demote({"m": scored(scores)}, {"m": tiers}, Ratios(0.4, 0.3, 0.3))
    again = _tiers((44, 37), 8, 6)
    again.load_state(tiers.state())
    assert torch.equal(again.map_rc, tiers.map_rc) and torch.equal(again.keep_RC, tiers.keep_RC)
    with pytest.raises(ValueError, match="another"):
        _tiers((44, 48), 8, 6).load_state(tiers.state())
    broken = tiers.state()
    place = (broken["map"] == 1).nonzero()[0]
    broken["map"][tuple(place)] = 0
    with pytest.raises(ValueError, match=r"not that of a dense block"):
        _tiers((44, 37), 8, 6).load_state(broken)


def test_bits_come_back():
    flags = torch.rand(37) > 0.5
    assert torch.equal(unpack_bits(pack_bits(flags), 37), flags) and pack_bits(flags).numel() == 5


def test_quantiles_are_those_of_each_tier():
    tiers = _tiers((16, 80))
    tiers.map_rc[0] = torch.tensor([0, 0, 0, 1, 2], dtype=torch.uint8)
    found = quantiles({"m": torch.tensor([[1.0, 3.0, 2.0, 7.0, 9.0]])}, {"m": tiers})
    assert found == {"dense": [1, 1, 2, 3, 3], "2:4": [7.0] * 5, "topk": [9.0] * 5}


def test_unstructured_drops_the_lowest_of_every_row_and_nothing_comes_back():
    scores = _scores((6, 40))
    keep = unstructured(scored(scores), 0.3, torch.ones(6, 40, dtype=torch.bool))
    assert (~keep).sum(1).tolist() == [12] * 6
    assert all(scores[i][~keep[i]].max() < scores[i][keep[i]].min() for i in range(6))
    more = unstructured(scored(_scores((6, 40), 1)), 0.5, keep)
    assert (~more).sum(1).tolist() == [20] * 6 and not (more & ~keep).any()
    with pytest.raises(ValueError, match="come back"):
        unstructured(scored(scores), 0.4, more)


def test_a_row_that_has_more_zeros_already_loses_no_more():
    keep = torch.ones(4, 40, dtype=torch.bool)
    keep[0, :16] = False  # 10 % of the matrix, but 40 % of this row
    found = unstructured(scored(_scores((4, 40))), 0.2, keep)
    assert (~found).sum(1).tolist() == [16, 6, 5, 5] and not (found & ~keep).any()  # 20 % of the matrix


@pytest.mark.parametrize(
    "draw", [torch.rand, lambda *shape, generator: torch.randint(0, 4, shape, generator=generator)]
)
def test_unstructured_masks_are_those_of_a_stable_sort(draw):
    scores = draw(300, 700, generator=torch.Generator().manual_seed(3)).float()  # more rows than one slab
    before = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4)) > 0.2
    order = scores.masked_fill(~before, -1).argsort(dim=1, stable=True)[:, :350]
    wanted = torch.ones_like(before).scatter_(1, order, False)
    assert torch.equal(unstructured(scored(scores), 0.5, before), wanted)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8)])
def test_groups_keep_their_best_and_of_equals_the_first(kept, of):
    scores = torch.randint(0, 5, (6, 42), generator=torch.Generator().manual_seed(2)).float()
    keep = groups(scored(scores), kept, of, torch.ones(6, 42, dtype=torch.bool))
    for row in range(6):
        for first in range(0, 42, of):
            group = scores[row, first : first + of].tolist()
            best = sorted(range(len(group)), key=lambda n: -group[n])[:kept]
            assert keep[row, first : first + of].tolist() == [n in best for n in range(len(group))]
    fewer = keep.clone()
    fewer[0, keep[0].nonzero()[0]] = False
    assert torch.equal(groups(scored(scores), kept, of, fewer), fewer)  # what went does not come back


def test_chosen_lowest_are_as_many_as_asked_for_in_every_group():
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 4.0, 2.0, 9.0]])
    eligible = torch.tensor([[True] * 4, [False, True, True, True], [True] * 4])
    found = lowest(values, eligible, torch.tensor([1, 2, 0]))
    assert found.tolist() == [[False, True, False, False], [False, True, True, False], [False] * 4]
    same = lowest(values, eligible, torch.tensor([2, 2, 2]))
    assert same.tolist() == [[False, True, True, False], [False, True, True, False], [True, False, True, False]]
