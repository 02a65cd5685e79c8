"""What all scorers promise, and what each of them computes."""

import pytest
import torch
import torch.nn.functional as F

from common.variants import variants
from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.samples import Samples, response_nll
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Context, Scorer
from lightning_modules.token_pruning.scorers.blocks import Blocks
from lightning_modules.token_pruning.scorers.duplication import Duplication
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.scorers.key_norm import KeyNorm
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from lightning_modules.token_pruning.scorers.learned import Learned
from lightning_modules.token_pruning.scorers.leave_one_out import LeaveOneOut
from lightning_modules.token_pruning.scorers.oracle import Oracle
from lightning_modules.token_pruning.scorers.random import Random
from lightning_modules.token_pruning.scorers.recency import Recency
from lightning_modules.token_pruning.scorers.saliency import SaliencyOracle
from lightning_modules.token_pruning.scorers.stride import UniformStride
from tests.lightning_modules.token_pruning.models import FAMILIES, HIDDEN, build, shared, tokens

AFTER, N = [1, 3], 60
SCHEDULE = Schedule(layers=AFTER, keep=0.6, of="prompt", tail=0.0, min_tail=5)
# other tests may define scorers of their own
KNOWN = [cls for cls in variants(Scorer) if cls.__module__.startswith("lightning_modules.")]
EXAMPLES = [example for cls in KNOWN for example in cls.examples()]
METHODS = [example for example in EXAMPLES if not example.oracle]


def _pruner():
    torch.manual_seed(1)
    pruner = TokenPruner.for_model(shared(), AFTER, network=MLP(16))
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.normal_()
    return pruner


def test_every_scorer_of_the_list_is_there():
    names = {cls.__name__ for cls in KNOWN}
    methods = {"Learned", "Random", "Recency", "UniformStride", "HiddenNorm", "KeyNorm", "LastWindow", "Duplication"}
    assert methods | {"SaliencyOracle", "LeaveOneOut"} <= names
    assert {type(example).__name__ for example in EXAMPLES} >= names - {"Learned"}


class _Watched:
    """Passes on what a scorer says, and remembers it; no `Scorer`, so that it is not one of the known."""

    def __init__(self, inner):
        self.inner, self.seen, self.prepare, self.check = inner, [], inner.prepare, inner.check
        self.pool, self.asking = inner.pool, inner.asking

    def score(self, hidden_BNH, layer, context):
        self.seen.append((self.inner.score(hidden_BNH, layer, context), context, hidden_BNH, layer))
        return self.seen[-1][0]


@torch.no_grad()
def _run(scorer, ids, mask=None, model=None, schedule=SCHEDULE):
    """What a scorer said at each stage, and what was kept."""
    watched, model = _Watched(scorer), model or shared()
    with PromptPruner(watched, schedule).prefill(model) as run:
        model(ids, attention_mask=mask)
    return watched.seen, run.kept()


@pytest.mark.parametrize("scorer", [*METHODS, Learned(_pruner())], ids=repr)
def test_scores_are_one_finite_number_a_token_under_one_budget(scorer):
    ids = F.pad(tokens(1, N - 20, seed=2), (20, 0))
    ids = torch.cat([tokens(1, N, seed=1), ids])
    mask = (ids != 0).long()
    state = torch.get_rng_state()
    for rows, given, lengths in ((ids[:1], None, [N]), (ids, mask, [N, N - 20])):
        seen, kept = _run(scorer, rows, given)
        for scores, context, hidden, _ in seen:
            assert scores.shape == hidden.shape[:2] and scores.is_floating_point()
            real = torch.ones_like(scores, dtype=torch.bool) if context.real is None else context.real
            assert scores[real].isfinite().all()
        assert kept.sum(-1).T.tolist() == [[SCHEDULE.budget(stage, n) for stage in (0, 1)] for n in lengths]
    assert torch.equal(torch.get_rng_state(), state), "a scorer must not draw from the global generator"


@pytest.mark.parametrize("scorer", [s for s in [*METHODS, Learned(_pruner())] if s.repeatable], ids=repr)
def test_repeatable_scorers_choose_alike_alone_and_in_a_padded_batch(scorer):
    rows = [tokens(N, seed=1), tokens(N - 20, seed=2)]
    ids = torch.stack([rows[0], F.pad(rows[1], (20, 0))])
    _, together = _run(scorer, ids, (ids != 0).long())
    for row, alone in enumerate(rows):
        _, kept = _run(scorer, alone[None])
        assert torch.equal(together[:, row, N - len(alone) :], kept[:, 0])


@pytest.mark.parametrize("scorer", METHODS, ids=repr)
def test_scorers_can_be_made_again_from_their_configuration(scorer):
    assert repr(type(scorer)(**scorer.arguments())) == repr(scorer)


def test_random_draws_differ_between_prompts_and_repeat_with_the_seed():
    ids, scorer = tokens(1, N), Random(7)
    first, second = (_run(scorer, ids)[1] for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(first, _run(Random(7), ids)[1])
    assert not torch.equal(first, _run(Random(8), ids)[1])


@pytest.mark.parametrize("inner", [HiddenNorm(), LastWindow(window=8)], ids=repr)
def test_blocks_stay_or_go_whole_by_the_mean_of_their_tokens(inner):
    schedule = Schedule(layers=AFTER, keep=[0.5, 0.25], of="prompt", sinks=3, tail=0.0, min_tail=10)
    seen, kept = _run(Blocks(inner, 5), tokens(1, 63), schedule=schedule)
    scores, context, hidden, layer = seen[0]
    plain = inner.score(hidden, layer, context)[0]
    # counted from the end: the last 10 are protected, and the first 3
    blocks = [range(start, start + 5) for start in range(3, 53, 5)]
    means = torch.stack([plain[list(block)].mean() for block in blocks])
    torch.testing.assert_close(scores[0, 3:53], means.repeat_interleave(5))
    for stage, budget in enumerate([32, 16]):
        stays = [int(kept[stage, 0, list(block)].sum()) for block in blocks]
        assert sum(stays) == budget - 13 and sum(count not in (0, 5) for count in stays) <= 1
    assert all(kept[0, 0, list(blocks[number])].all() for number in means.argsort(descending=True)[:3])


def test_blocks_are_what_the_scorer_inside_is():
    assert Blocks(LastWindow(window=7)).asking == 7 and not Blocks(Random()).repeatable and Blocks(Random()).pool == 1
    assert Blocks(SaliencyOracle()).oracle and Blocks(Learned(_pruner())).flops(9, HIDDEN) == Learned(_pruner()).flops(
        9, HIDDEN
    )
    with pytest.raises(ValueError, match="has 4 heads"):
        PromptPruner(Blocks(LastWindow(only={2: [4]})), SCHEDULE).check(shared().config)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Blocks(Random(), 0)


def test_controls_take_single_tokens():
    assert {scorer.pool for scorer in (Random(), Recency(), UniformStride())} == {1}


def test_recency_keeps_the_sinks_and_the_end():
    _, kept = _run(Recency(), tokens(1, N))
    assert kept[1, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(N - 18, N)]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_uniform_stride_leaves_gaps_that_differ_by_one_at_most(keep):
    schedule = Schedule(layers=[1], keep=keep, of="prompt", sinks=0, tail=0.0, min_tail=1)
    _, kept = _run(UniformStride(), tokens(1, 100), schedule=schedule)
    places = kept[0, 0, :99].nonzero().flatten()
    gaps = places.diff()
    assert gaps.max() - gaps.min() <= 1 and len(places) == round(100 * keep) - 1


def test_hidden_norm_is_the_length_of_the_hidden_state():
    (scores, _, hidden, _), _ = _run(HiddenNorm(), tokens(2, N))[0]
    torch.testing.assert_close(scores, hidden.pow(2).sum(-1).sqrt())


@torch.no_grad()
def test_key_norm_is_minus_the_length_of_the_next_layers_keys():
    model = shared()
    (scores, *_), _ = _run(KeyNorm(), tokens(2, N))[0]
    keys = model(tokens(2, N), use_cache=True).past_key_values.layers[AFTER[0] + 1].keys
    torch.testing.assert_close(scores, -keys.norm(dim=-1).mean(1))


@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
@torch.no_grad()
def test_last_window_is_the_attention_of_the_next_layer_under_any_kernel(family, kernel):
    ids = F.pad(tokens(2, N - 6), (6, 0))
    ids[0, :6] = 5
    mask = (ids != 0).long()
    attentions = shared(family, "eager")(ids, attention_mask=mask, output_attentions=True).attentions
    paid = attentions[AFTER[0] + 1][:, :, -8:].mean(2)
    two = {AFTER[0] + 1: [0, 3]}
    wanted = {
        LastWindow(8, "mean"): paid.mean(1),
        LastWindow(8, "max"): paid.amax(1),
        LastWindow(8, "mean", two): paid[:, [0, 3]].mean(1),
        LastWindow(8, "max", {AFTER[0]: [1]}): paid.amax(1),  # a layer that is not asked
    }
    for scorer, scores in wanted.items():
        (got, *_), _ = _run(scorer, ids, mask, shared(family, kernel))[0]
        torch.testing.assert_close(got, scores, atol=1e-5, rtol=1e-4)


def test_a_head_that_the_model_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"layer 2 has 4 heads, \[1, 4\]"):
        PromptPruner(LastWindow(only={2: [1, 4]}), SCHEDULE).check(shared().config)
    for layer in (6, -1):
        with pytest.raises(ValueError, match=f"only: there is no layer {layer}, the model has 6"):
            PromptPruner(LastWindow(only={layer: [1]}), SCHEDULE).check(shared().config)
    for arguments, name in (({"window": 0}, "window"), ({"heads": "sum"}, "heads"), ({"only": {1: []}}, "only")):
        with pytest.raises(ValueError, match=name):
            LastWindow(**arguments)


@torch.no_grad()
def test_neighbours_count_unless_protected_or_asking():
    ids, scorer = tokens(1, N), LastWindow(window=8)
    schedule = Schedule(layers=[1], keep=0.4, tail=0.0, min_tail=5, sinks=2, pool=5)
    (scores, *_), *_ = _run(scorer, ids, schedule=schedule)[0]
    wanted = [
        scores[0, [j for j in range(i - 2, i + 3) if 2 <= j < N - 8]].mean() if 2 <= i < N - 8 else scores[0, i]
        for i in range(N)
    ]
    ranked = torch.stack(wanted)
    ranked[:2] = ranked[-5:] = torch.inf
    _, kept = _run(scorer, ids, schedule=schedule)
    assert kept[0, 0].sum() == schedule.budget(0, N) == 7 + 22
    assert kept[0, 0].nonzero().flatten().tolist() == ranked.topk(29).indices.sort().values.tolist()
    _, alone = _run(scorer, ids, schedule=Schedule(layers=[1], keep=0.4, tail=0.0, min_tail=5, sinks=2, pool=1))
    assert not torch.equal(kept, alone)


def test_duplication_drops_a_copy_and_keeps_what_is_alone():
    hidden = torch.eye(8)[None, [0, 1, 2, 0, 3, 1, 4, 5]]
    positions = torch.arange(8)[None]
    context = _context(positions)
    scores = Duplication(pivots=2).score(hidden, 0, context)[0]
    # pivots are tokens 2 and 6; nothing else is like them, so all others score 0, until one is a copy of a pivot
    assert scores.tolist() == [0, 0, 2, 0, 0, 0, 2, 0]
    hidden[0, 3] = hidden[0, 2] * 3
    assert Duplication(pivots=2).score(hidden, 0, context)[0, 3] == -1


def _context(positions):
    none = torch.zeros_like(positions, dtype=torch.bool)
    return Context(anatomy(shared()), positions, None, none, (4,), None)


def test_the_trained_scorer_scores_as_it_was_trained(tmp_path):
    pruner = _pruner()
    pruner.save(tmp_path / "pruner")
    for scorer in (Learned(pruner), Learned(str(tmp_path / "pruner"))):
        for scores, _, hidden, layer in _run(scorer, tokens(1, N))[0]:
            torch.testing.assert_close(scores, pruner(hidden, layer))
    assert Learned(pruner).flops(10, HIDDEN) == 2 * 10 * 16 * (HIDDEN + 1)


def test_the_trained_scorer_refuses_other_layers_and_models():
    scorer, schedule = Learned(_pruner()), Schedule(layers=[1, 2])
    with pytest.raises(ValueError, match=r"no trained scorer for layers \[2\]"):
        PromptPruner(scorer, schedule).prefill(shared()).__enter__()
    with pytest.raises(ValueError, match="another base model"):
        PromptPruner(scorer, SCHEDULE).prefill(build("qwen2")).__enter__()


def _samples(rows=2, length=24, response=6):
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[:, :-response] = IGNORED
    real = torch.ones_like(ids, dtype=torch.bool)
    return Samples(ids, labels, real, labels == IGNORED)


def test_leave_one_out_is_what_dropping_one_token_costs():
    model, samples = shared(), _samples()
    worth = LeaveOneOut(batch=5).measure(model, samples, [1])[1]
    assert not worth[:, -6:].any()

    class Drop(Recency):
        def score(self, hidden_BNH, layer, context):
            return (context.positions != self.token).float()

    with torch.no_grad():
        whole, _ = response_nll(model(samples.input_ids).logits, samples.labels)
        for token in (4, 9, 15):
            scorer = Drop()
            scorer.token = token
            schedule = Schedule(layers=[1], tokens=23, of="prompt", sinks=0, tail=0.0, min_tail=1)
            with PromptPruner(scorer, schedule).prefill(model):
                nll, _ = response_nll(model(samples.input_ids).logits, samples.labels)
            torch.testing.assert_close(worth[:, token], nll - whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("oracle", [e for e in EXAMPLES if e.oracle], ids=repr)
def test_oracles_keep_what_they_saw_to_matter(oracle):
    assert isinstance(oracle, Oracle)
    model, samples = shared(), _samples()
    schedule = Schedule(layers=AFTER, keep=[0.75, 0.5], of="prompt", sinks=0, tail=0.0, min_tail=6)
    oracle.look(model, samples, AFTER)
    _, kept = _run(oracle, samples.input_ids, schedule=schedule)
    values = oracle.measure(model, samples, AFTER)[1]
    for row in range(2):
        best = values[row, :18].argsort(descending=True)[:12]  # 18 of 24 stay, 6 of them protected
        assert kept[0, row, best].all()


def test_an_oracle_that_has_not_looked_says_so():
    with pytest.raises(ValueError, match="call look"):
        _run(SaliencyOracle(), tokens(1, N))
