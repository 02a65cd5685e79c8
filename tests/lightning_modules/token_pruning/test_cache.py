"""The pruned cache on its own, and what pruning refuses."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.scorers.random import Random
from tests.lightning_modules.token_pruning.models import LAYERS, build, shared, tokens
from tests.lightning_modules.token_pruning.prompts import ROWS, N, padded, prompt_pruner


@torch.no_grad()
def test_the_cache_follows_its_rows_when_beams_change_places():
    model, (ids, mask) = shared("llama", "eager"), padded(ROWS)
    order = torch.tensor([1, 2, 0])
    step, whole = tokens(3, 4, seed=11), F.pad(mask, (0, 4), value=1)
    call = {"attention_mask": whole, "position_ids": (whole.cumsum(-1) - 1)[:, -4:], "use_cache": True}
    with prompt_pruner(scorer=Random(3)).prefill(model) as run:
        cache = DynamicCache()
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        other, kept = copy.deepcopy(cache), run.kept()
        wanted = model(step, past_key_values=cache, **call).logits[order]
        other.reorder_cache(order)
        turned = {name: value[order] if name != "use_cache" else value for name, value in call.items()}
        torch.testing.assert_close(model(step[order], past_key_values=other, **turned).logits, wanted)
        assert torch.equal(torch.stack([stage.kept(N) for stage in other.stages]), kept[:, order])


@torch.no_grad()
def test_a_pruned_cache_outside_its_context_is_refused():
    model = shared()
    cache = DynamicCache()
    with prompt_pruner().prefill(model):
        model(tokens(1, N), past_key_values=cache, use_cache=True)
        copied = copy.deepcopy(cache)
    for one in (cache, copied):
        with pytest.raises(RuntimeError, match=r"inside `with pruner\.prefill"):
            model(tokens(1, 2), past_key_values=one, use_cache=True)
    with prompt_pruner().prefill(model):
        model(tokens(1, 2), past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_copies_rows_and_cropping_of_the_cache():
    model, (ids, mask) = shared("llama", "eager"), padded(ROWS)
    step, whole = tokens(3, 4, seed=11), F.pad(mask, (0, 4), value=1)
    positions = (whole.cumsum(-1) - 1)[:, -4:]
    with prompt_pruner().prefill(model):
        cache = DynamicCache()
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        bytes_before, copied = cache.bytes(), copy.deepcopy(cache)
        widths = [mask.shape[1] for mask in cache.masks if mask is not None]
        call = {"attention_mask": whole, "position_ids": positions, "use_cache": True}
        wanted = model(step, past_key_values=cache, **call).logits
        assert cache.bytes() == bytes_before + 2 * 4 * LAYERS * 3 * 4 * 2 * 16  # k and v, float32, rows, heads, width
        cache.crop(-4)
        assert widths and [mask.shape[1] for mask in cache.masks if mask is not None] == widths
        assert torch.equal(model(step, past_key_values=cache, **call).logits, wanted)
        order = torch.tensor([2, 0])
        copied.batch_repeat_interleave(2)
        copied.batch_select_indices(torch.tensor([4, 0]))
        call = {"attention_mask": whole[order], "position_ids": positions[order], "use_cache": True}
        torch.testing.assert_close(model(step[order], past_key_values=copied, **call).logits, wanted[order])
        with pytest.raises(ValueError, match="reaches into the pruned prompt"):
            cache.crop(-5)
        with pytest.raises(ValueError, match=r"crop\(4\): .* negative"):
            cache.crop(4)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.stages == []


@torch.no_grad()
def test_the_model_is_left_as_it_was_even_after_an_error():
    model, ids = shared(), tokens(1, N)
    wanted = model(ids).logits
    with pytest.raises(ZeroDivisionError), prompt_pruner().prefill(model):
        model(ids)
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, wanted)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_pruned_is_refused():
    model, ids = shared(), tokens(1, N)
    with prompt_pruner().prefill(model), pytest.raises(RuntimeError, match="already"), prompt_pruner().prefill(model):
        pass
    with pytest.raises(ValueError, match="the model has 2 layers"), PromptPruner(HiddenNorm()).prefill(build(layers=2)):
        pass
    with prompt_pruner().prefill(model), torch.no_grad():
        with pytest.raises(ValueError, match="DynamicCache, not StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=128))
        with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
            model(ids, attention_mask=torch.ones(1, 1, N, N))
        with pytest.raises(ValueError, match="on the left"):
            model(ids, attention_mask=(torch.arange(N) < 90)[None])
        with pytest.raises(ValueError, match="packed"):
            model(ids, position_ids=torch.arange(N)[None] % 50, use_cache=False)


def test_a_padding_token_within_the_text_is_text():
    """As generate() masks it, that is given no mask."""
    model, ids = shared(), tokens(2, N)
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, :10], mask[1, 50] = 0, 0
    with prompt_pruner().prefill(model) as holes, torch.no_grad():
        model(ids, attention_mask=mask)
    mask[1, 50] = 1
    with prompt_pruner().prefill(model) as whole, torch.no_grad():
        model(ids, attention_mask=mask)
    assert len(holes.stages) == len(whole.stages) > 0
    assert torch.equal(holes.kept().sum(-1), whole.kept().sum(-1))


def test_scores_of_the_wrong_shape_name_the_scorer():
    short = mock.patch.object(HiddenNorm, "score", lambda self, hidden_BNH, layer, context: hidden_BNH[:, 1:, 0])
    wanted = pytest.raises(ValueError, match=r"HiddenNorm.*\(1, 95\)")
    with short, prompt_pruner(scorer=HiddenNorm()).prefill(shared()), wanted:
        shared()(tokens(1, N))
