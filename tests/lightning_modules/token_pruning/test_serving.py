"""Pruning as a server meets it: cached prefixes, later turns, options of `generate`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig, StaticCache

from lightning_modules.token_pruning.cache import PrunedCache
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from tests.lightning_modules.token_pruning.models import FAMILIES, shared, tokens
from tests.lightning_modules.token_pruning.oracle import masked_logits
from tests.lightning_modules.token_pruning.prompts import AFTER, ROWS, N, padded, prompt_pruner

everywhere = pytest.mark.parametrize(("family", "kernel"), FAMILIES)
kernels = pytest.mark.parametrize("kernel", ["sdpa", "eager"])
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SYSTEM, P = tokens(1, 30, seed=20), 30


def talk(keep=0.7):
    return PromptPruner(HiddenNorm(), Schedule(layers=AFTER, keep=keep, of="prompt", min_tail=16), later_turns=True)


def said(rows, width):
    return torch.ones(len(AFTER), rows, width, dtype=torch.bool)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def prefix_cache(model, ids=SYSTEM, **call):
    """A cache that holds a text which was read whole."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, **call)
    return cache


@everywhere
@torch.no_grad()
def test_behind_a_cached_prefix_only_the_new_part_is_pruned(family, kernel):
    model, ids, step, turn = shared(family, kernel), tokens(1, N), tokens(1, 1, seed=5), tokens(1, 9, seed=6)
    cache = prefix_cache(model)
    system = copy.deepcopy(cache)
    with prompt_pruner().prefill(model) as run:
        got = [model(chunk, past_key_values=cache, use_cache=True).logits for chunk in (ids, step, turn)]
        kept = run.kept()
    assert cache.lengths() == [P + n + 10 for n in (96, 96, 68, 68, 48, 48)]
    assert kept.shape == (2, 1, N) and torch.equal(run.input_ids, ids)
    whole = torch.cat([SYSTEM, ids, step, turn], dim=1)
    visible = torch.cat([said(1, P), kept], dim=2)
    survivors = torch.cat([kept[-1], said(1, 10)[0]], dim=1)
    close(torch.cat(got, dim=1)[survivors], masked_logits(model, whole, AFTER, visible)[:, P:][survivors])
    for before, after in zip(system.layers, cache.layers, strict=True):
        assert torch.equal(after.keys[:, :, :P], before.keys) and torch.equal(after.values[:, :, :P], before.values)


@everywhere
@torch.no_grad()
def test_a_cached_prefix_and_all_kept_changes_no_bit(family, kernel):
    model, ids, turn = shared(family, kernel), tokens(1, N), tokens(1, 40, seed=6)
    caches = [prefix_cache(model) for _ in range(2)]
    wanted = [model(chunk, past_key_values=caches[0], use_cache=True).logits for chunk in (ids, turn)]
    with talk(1.0).prefill(model) as run:
        for chunk, logits in zip((ids, turn), wanted, strict=True):
            assert torch.equal(model(chunk, past_key_values=caches[1], use_cache=True).logits, logits)
            assert len(run.stages) == 2 and run.length == chunk.shape[1]


@kernels
@torch.no_grad()
def test_prefixes_and_prompts_padded_on_the_left_equal_masked_and_single_ones(kernel):
    model = shared("llama", kernel)
    systems, (ids, mask) = [tokens(30, seed=20), tokens(21, seed=21), tokens(30, seed=22)], padded(ROWS)
    system, system_mask = padded(systems)
    whole = torch.cat([system_mask, mask], dim=1)
    places = (whole.cumsum(-1) - 1).clamp_min(0)
    call = {"attention_mask": whole, "position_ids": places[:, P:], "use_cache": True}
    before = {"attention_mask": system_mask, "position_ids": places[:, :P]}
    unpruned = model(ids, past_key_values=prefix_cache(model, system, **before), **call).logits
    cache = prefix_cache(model, system, **before)
    with talk(1.0).prefill(model) as run:
        found = model(ids, past_key_values=cache, **call).logits
    assert len(run.stages) == 2
    assert torch.equal(found[mask.bool()], unpruned[mask.bool()])
    for scorer in (HiddenNorm(), LastWindow()):
        cache = prefix_cache(model, system, **before)
        with prompt_pruner(scorer=scorer).prefill(model) as run:
            found = model(ids, past_key_values=cache, **call).logits[:, -1]
            kept = run.kept()
        assert not (kept & ~mask.bool()).any()
        visible = torch.cat([said(3, P), kept], dim=2)
        close(found, masked_logits(model, torch.cat([system, ids], dim=1), AFTER, visible, whole)[:, -1])
        for row, (first, new) in enumerate(zip(systems, ROWS, strict=True)):
            alone = prefix_cache(model, first[None])
            with prompt_pruner(scorer=scorer).prefill(model) as run:
                close(model(new[None], past_key_values=alone, use_cache=True).logits[0, -1], found[row])
                assert torch.equal(run.kept()[:, 0], kept[:, row, N - len(new) :])


@torch.no_grad()
def test_generate_goes_on_from_a_prefix_read_outside_or_inside():
    model, ids = shared(), torch.cat([SYSTEM, tokens(1, N)], dim=1)
    outside = prefix_cache(model, SYSTEM[:, :18])
    with prompt_pruner().prefill(model) as run:
        inside = DynamicCache()
        with pytest.warns(UserWarning, match="nothing pruned"):  # it is no longer than what is protected
            model(SYSTEM[:, :18], past_key_values=inside, use_cache=True)
        found = []
        for cache in (outside, inside):
            found.append((model.generate(ids, past_key_values=cache, **GREEDY), run.kept()))
            assert run.stages and run.length == ids.shape[1] - 18
    for text, kept in found:
        visible = torch.cat([said(1, 18), kept], dim=2)
        for step in range(ids.shape[1], text.shape[1]):
            assert text[0, step] == masked_logits(model, text[:, :step], AFTER, visible)[:, -1].argmax(-1)


@torch.no_grad()
def test_the_prefix_is_asked_again_after_cropping_to_it():
    model, mask = shared("llama", "eager"), torch.ones(2, P + N + 4, dtype=torch.long)
    mask[0, :5], mask[1, P : P + 11] = 0, 0
    system, ids, other = tokens(2, P, seed=20), tokens(2, N), tokens(2, N - 20, seed=31)
    places = (mask.cumsum(-1) - 1).clamp_min(0)

    def read(ids, cache, start):
        end = start + ids.shape[1]
        call = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "use_cache": True}
        return model(ids, past_key_values=cache, **call).logits

    cache, fresh = DynamicCache(), DynamicCache()
    for each in (cache, fresh):
        read(system, each, 0)
    with prompt_pruner().prefill(model) as run:
        wanted = read(other, fresh, P)
        read(ids, cache, P)
        tail = read(tokens(2, 4, seed=9), cache, P + N)
        cache.crop(-4)
        assert torch.equal(read(tokens(2, 4, seed=9), cache, P + N), tail)
        with pytest.raises(ValueError, match="cannot crop 5 tokens: that reaches into the pruned prompt"):
            cache.crop(-5)
        cache.crop(-(4 + N))
        assert cache.lengths() == [P] * 6 and cache.stretches == []
        assert torch.equal(read(other, cache, P), wanted) and run.kept().shape == (2, 2, N - 20)
        assert cache.lengths() == fresh.lengths()


@everywhere
@torch.no_grad()
def test_later_turns_are_pruned_when_asked_for(family, kernel):
    model, cache = shared(family, kernel), DynamicCache()
    turns = [tokens(1, N), tokens(1, 1, seed=5), tokens(1, 70, seed=6), tokens(1, 1, seed=7), tokens(1, 12, seed=8)]
    with talk().prefill(model) as run:
        got, kept = [], []
        for turn in turns:
            got.append(model(turn, past_key_values=cache, use_cache=True).logits)
            kept.append(run.kept() if turn.shape[1] > 12 else said(1, turn.shape[1]))
    visible, sequence = torch.cat(kept, dim=2), torch.cat(turns, dim=1)
    assert kept[2].sum(-1).flatten().tolist() == [49, 35]
    assert cache.lengths() == [180, 180, 131, 131, 97, 97] and len(cache.stretches) == 2
    survivors = visible[-1]
    close(torch.cat(got, dim=1)[survivors], masked_logits(model, sequence, AFTER, visible)[survivors])


@torch.no_grad()
def test_a_context_for_every_turn_prunes_as_one_for_all():
    model, turns, once, each = shared(), [tokens(1, N), tokens(1, 70, seed=6)], DynamicCache(), DynamicCache()
    with talk().prefill(model):
        wanted = [model(turn, past_key_values=once, use_cache=True).logits for turn in turns]
    for turn, logits in zip(turns, wanted, strict=True):
        with talk().prefill(model) as run:
            assert torch.equal(model(turn, past_key_values=each, use_cache=True).logits, logits)
        assert len(run.stages) == len(AFTER)
    assert each.lengths() == once.lengths()


@kernels
@torch.no_grad()
def test_later_turns_of_a_padded_batch_and_its_beams(kernel):
    model, (ids, mask) = shared("llama", kernel), padded(ROWS)
    turn, turn_mask = padded([tokens(60, seed=7), tokens(33, seed=8), tokens(18, seed=9)])
    whole = torch.cat([mask, turn_mask], dim=1)
    places = (whole.cumsum(-1) - 1).clamp_min(0)
    with talk().prefill(model) as run:
        cache = DynamicCache()
        model(ids, attention_mask=mask, position_ids=places[:, :N], past_key_values=cache)
        kept = [run.kept()]
        with pytest.warns(
            UserWarning, match=r"a prompt of 33 tokens the stages after layers \[3\] keep only the 20 pro"
        ):
            last = model(turn, attention_mask=whole, position_ids=places[:, N:], past_key_values=cache).logits[:, -1]
        kept.append(run.kept())
        assert kept[1][-1].sum(-1).tolist() == [30, 20, 18]
        visible, sequence = torch.cat(kept, dim=2), torch.cat([ids, turn], dim=1)
        held = cache.lengths()
        cache.crop(-60)
        with pytest.raises(ValueError, match="reaches into the pruned prompt"):
            cache.crop(-1)
        again = model(turn, attention_mask=whole, position_ids=places[:, N:], past_key_values=cache).logits[:, -1]
        assert torch.equal(again, last) and cache.lengths() == held and len(cache.stretches) == 2
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        step, longer = tokens(3, 1, seed=11), F.pad(whole[order], (0, 1), value=1)
        found = model(step, attention_mask=longer, position_ids=longer.sum(1, keepdim=True) - 1, past_key_values=cache)
    close(last, masked_logits(model, sequence, AFTER, visible, whole)[:, -1])
    wanted = masked_logits(model, torch.cat([sequence[order], step], dim=1), AFTER, visible[:, order], longer)
    close(found.logits[:, -1], wanted[:, -1])


@torch.no_grad()
def test_a_cache_pruned_by_another_schedule_is_refused():
    model, cache = shared(), DynamicCache()
    with prompt_pruner().prefill(model):
        model(tokens(1, N), past_key_values=cache, use_cache=True)
    other = PromptPruner(HiddenNorm(), Schedule(layers=[2]))
    with other.prefill(model), pytest.raises(ValueError, match=r"pruned after layers \[1, 3\].*after \[2\]"):
        model(tokens(1, 1), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_generating_without_a_cache_gives_the_same_answers(family):
    model, (ids, mask) = shared(family), padded(ROWS)
    for scorer in (HiddenNorm(), LastWindow()):
        with prompt_pruner(scorer=scorer).prefill(model) as run:
            for options in ({}, {"num_beams": 2}):
                call = {"attention_mask": mask, **GREEDY, **options}
                wanted, kept = model.generate(ids, **call), run.kept()
                assert torch.equal(model.generate(ids, use_cache=False, **call), wanted)
                assert torch.equal(run.kept(), kept) and run.length == N
            short = tokens(1, 18)
            with pytest.warns(UserWarning, match="nothing pruned"):
                wanted = model.generate(short, **GREEDY)
            # the answer makes the text longer than what is protected, and is no prompt
            assert torch.equal(model.generate(short, use_cache=False, **GREEDY), wanted) and not run.stages
            assert len(run.stages) == 0
            model(tokens(1, N), use_cache=False)
            assert run.stages[-1].index.shape == (1, 48)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 32},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": shared()},
        {"assistant_early_exit": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
    ],
)
def test_options_of_generate_that_would_be_wrong_are_refused_by_name(options):
    (name, value), model, ids = next(iter(options.items())), shared(), tokens(1, N)
    with prompt_pruner().prefill(model) as run:
        with pytest.raises(ValueError, match=name):
            model.generate(ids, **options, **GREEDY)
        if name != "assistant_model":
            with pytest.raises(ValueError, match=name):
                model.generate(ids, generation_config=GenerationConfig(**options, **GREEDY))
            with pytest.raises(ValueError, match=name):
                model.generate(ids, GenerationConfig(**options, **GREEDY))
            own = copy.deepcopy(model.generation_config)
            try:
                setattr(model.generation_config, name, value)
                with pytest.raises(ValueError, match=name):
                    model.generate(ids, **GREEDY)
            finally:
                model.generation_config = own
        assert run.length == 0  # nothing was read
        model.generate(ids, **GREEDY)
    assert "generate" not in vars(model)


@torch.no_grad()
def test_other_caches_are_refused_before_a_layer_runs():
    model, ids, cache = shared(), tokens(1, N), StaticCache(config=shared().config, max_cache_len=128)
    with prompt_pruner().prefill(model):
        with pytest.raises(ValueError, match="DynamicCache, not StaticCache"):
            model(ids, past_key_values=cache)
        assert not cache.layers[0].is_initialized
        cache = DynamicCache()
        with pytest.raises(ValueError, match="attention_mask has 5 columns for 0 cached tokens and 96 new ones"):
            model(ids, attention_mask=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    assert not isinstance(cache, PrunedCache)
