"""Pruned prefill and everything after it, against a model in which nothing is removed."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, TextStreamer

from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.cache import PrunedCache
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.random import Random
from tests.lightning_modules.token_pruning.models import FAMILIES, build, shared, tokens
from tests.lightning_modules.token_pruning.oracle import masked_logits
from tests.lightning_modules.token_pruning.prompts import AFTER, ROWS, N, padded, prompt_pruner

everywhere = pytest.mark.parametrize(("family", "kernel"), FAMILIES)
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@everywhere
@torch.no_grad()
def test_keeping_all_changes_no_bit(family, kernel):
    model, ids = shared(family, kernel), tokens(1, N)
    batch, mask = padded(ROWS)
    wanted = [model(ids).logits, model(batch, attention_mask=mask).logits]
    texts = [model.generate(ids, **GREEDY), model.generate(batch, attention_mask=mask, **GREEDY)]
    with prompt_pruner(1.0).prefill(model) as run:
        assert torch.equal(model(ids).logits, wanted[0]) and len(run.stages) == 2
        real = mask.bool()
        assert torch.equal(model(batch, attention_mask=mask).logits[real], wanted[1][real])
        assert torch.equal(model.generate(ids, **GREEDY), texts[0])
        assert torch.equal(model.generate(batch, attention_mask=mask, **GREEDY), texts[1])


@everywhere
@torch.no_grad()
def test_pruned_equals_masked_through_decoding_and_a_second_turn(family, kernel):
    model, ids, answer, turn = shared(family, kernel), tokens(1, N), tokens(1, 3, seed=5), tokens(1, 20, seed=6)
    with prompt_pruner().prefill(model) as run:
        cache, got = DynamicCache(), []
        for chunk in (ids, *answer.split(1, dim=1), turn):
            got.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        kept = run.kept()
    sequence = torch.cat([ids, answer, turn], dim=1)
    wanted = masked_logits(model, sequence, AFTER, kept)
    survivors = torch.cat([kept[-1], torch.ones(1, 23, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(torch.cat(got, dim=1)[survivors], wanted[survivors], atol=1e-5, rtol=1e-5)
    assert cache.lengths() == [n + 23 for n in (96, 96, 68, 68, 48, 48)]
    assert kept.sum(-1).flatten().tolist() == [68, 48] and not (kept[1] & ~kept[0]).any()


@everywhere
@torch.no_grad()
def test_padded_batch_equals_masked_and_single_prompts(family, kernel):
    model = shared(family, kernel)
    ids, mask = padded(ROWS)
    with prompt_pruner().prefill(model) as run:
        text = model.generate(ids, attention_mask=mask, **GREEDY)
        alone = [model.generate(row[None], **GREEDY)[0, len(row) :] for row in ROWS]
        cache = DynamicCache()
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        first = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]
        kept = run.kept()
        # a second turn in which the rows say different amounts
        turn, turn_mask = padded([tokens(20, seed=7), tokens(9, seed=8), tokens(14, seed=9)])
        whole = torch.cat([mask, turn_mask], dim=1)
        positions = (whole.cumsum(-1) - 1).clamp_min(0)[:, ids.shape[1] :]
        second = model(
            turn, attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    assert [torch.equal(text[row, N:], alone[row]) for row in range(3)] == [True] * 3
    assert (kept[-1] & ~mask.bool()).sum() == 0
    wanted = masked_logits(model, torch.cat([ids, turn], dim=1), AFTER, kept, whole)
    torch.testing.assert_close(first, wanted[:, ids.shape[1] - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, wanted[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_decoder_takes_its_mask_by_position():
    model, (ids, mask) = shared(), padded(ROWS)
    found = []
    for args, named in (((ids, mask), {}), ((ids,), {"attention_mask": mask})):
        with prompt_pruner().prefill(model) as run:
            model.model(*args, **named)
            found.append(run.kept())
    assert torch.equal(*found) and not found[0][:, ~mask.bool()].any()


@torch.no_grad()
def test_padding_in_a_second_turn_after_a_first_without(family="llama"):
    for kernel in ("sdpa", "eager"):
        model, ids = shared(family, kernel), tokens(2, N)
        turn, turn_mask = padded([tokens(12, seed=7), tokens(5, seed=8)])
        whole = torch.cat([torch.ones(2, N, dtype=torch.long), turn_mask], dim=1)
        positions = (whole.cumsum(-1) - 1)[:, N:]
        with prompt_pruner().prefill(model) as run:
            cache = DynamicCache()
            model(ids, past_key_values=cache, use_cache=True)
            got = model(turn, attention_mask=whole, position_ids=positions, past_key_values=cache).logits[:, -1]
        wanted = masked_logits(model, torch.cat([ids, turn], dim=1), AFTER, run.kept(), whole)[:, -1]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


BEAMS = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "return_dict_in_generate": True}


@everywhere
@torch.no_grad()
def test_beam_scores_are_those_of_the_masked_model(family, kernel):
    model, ids = shared(family, kernel), tokens(2, N)
    with prompt_pruner().prefill(model) as run:
        found = model.generate(ids, max_new_tokens=4, output_scores=True, **BEAMS)
        kept = run.kept()[:, ::3]  # a repeatable scorer: all beams of a prompt keep the same tokens
    logs = masked_logits(model, found.sequences, AFTER, kept)[:, N - 1 : -1].log_softmax(-1)
    sums = logs.gather(2, found.sequences[:, N:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, sums, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sampling_draws_from_the_pruned_distribution():
    model, ids = shared(), tokens(1, N)
    options = {"do_sample": True, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    with prompt_pruner().prefill(model) as run:
        drawn = model.generate(ids, **options)
    wanted = masked_logits(model, drawn.sequences, AFTER, run.kept())[:, N - 1 : -1]
    torch.testing.assert_close(torch.stack(drawn.logits, dim=1), wanted, atol=1e-5, rtol=1e-5)


class _Words:
    """As much of a tokenizer as streaming needs."""

    def decode(self, ids, **_):
        return "".join(f"<{i}> " for i in ids)


@torch.no_grad()
def test_streaming_prints_what_generate_returns(capsys):
    model, ids = shared(), tokens(1, N)
    with prompt_pruner().prefill(model):
        text = model.generate(ids, streamer=TextStreamer(_Words(), skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.split() == [f"<{i}>" for i in text[0, N:]]


@torch.no_grad()
def test_a_conversation_through_generate_keeps_its_cache():
    model, ids = shared(), tokens(1, N)
    cache = DynamicCache()
    with prompt_pruner().prefill(model) as run:
        said = model.generate(ids, past_key_values=cache, **GREEDY)
        longer = torch.cat([said, tokens(1, 10, seed=4)], dim=1)
        answer = model.generate(longer, past_key_values=cache, **GREEDY)
        kept = run.kept()
    assert isinstance(cache, PrunedCache) and cache.get_seq_length() == N + 5 + 10 + 4
    for step in range(longer.shape[1], answer.shape[1]):
        wanted = masked_logits(model, answer[:, :step], AFTER, kept)[:, -1].argmax(-1)
        assert answer[0, step] == wanted


@torch.no_grad()
def test_logits_to_keep_and_labels_mean_what_they_mean():
    model, ids = shared(), tokens(2, N)
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]
    with prompt_pruner().prefill(model) as run:
        all_logits = model(ids).logits
        for few, same in ((1, all_logits[:, -1:]), (torch.tensor([2, 95]), all_logits[:, [2, 95]])):
            torch.testing.assert_close(model(ids, logits_to_keep=few).logits, same)
        loss = model(ids, labels=labels).loss
        kept = run.kept()
    wanted = masked_logits(model, ids, AFTER, kept)
    expected = F.cross_entropy(wanted[:, -9:-1].flatten(0, 1), ids[:, -8:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert not all_logits[~kept[-1]].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_prunes_once_and_gives_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        model = build(family, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with prompt_pruner().prefill(model) as run:
            model(tokens(1, N), use_cache=False).logits[0, -1].logsumexp(0).backward()
            assert len(run.stages) == 2
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_positions_stay_the_original_ones():
    model, ids = shared(), tokens(1, N)
    seen = {}
    layer = anatomy(model).layers[AFTER[0] + 1]
    with prompt_pruner().prefill(model) as run:
        handle = layer.register_forward_pre_hook(lambda _, a, k: seen.update(k), with_kwargs=True)
        model(ids)
        handle.remove()
    index = run.stages[0].index
    whole = model.model.rotary_emb(torch.zeros(1), torch.arange(N)[None])
    for got, table in zip(seen["position_embeddings"], whole, strict=True):
        assert torch.equal(got, table[:, index[0]])


@torch.no_grad()
def test_a_short_prompt_does_not_hide_that_a_stage_has_no_choice_in_longer_ones():
    model, pruner = shared(), PromptPruner(Random(), Schedule(layers=[1, 3], keep=[0.9, 0.2], of="prompt", min_tail=16))
    with pruner.prefill(model) as run:
        with pytest.warns(UserWarning, match="nothing pruned"):
            model(tokens(1, 18))
        with pytest.warns(UserWarning, match=r"prompt of 40 tokens the stages after layers \[3\] keep only the 20"):
            model(tokens(1, 40))
        model(tokens(1, 40))  # said once
        assert len(run.stages) == 2
        with pytest.raises(ValueError, match="the prompt is empty"):
            model(torch.empty(1, 0, dtype=torch.long))


@torch.no_grad()
def test_a_prompt_that_is_all_protected_is_left_alone_and_said_once():
    model, ids = shared(), tokens(1, 18)
    wanted = model(ids).logits
    with prompt_pruner(0.1).prefill(model) as run:
        with pytest.warns(UserWarning, match="nothing pruned: a prompt of 18 tokens"):
            assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model(ids).logits, wanted) and run.stages == []  # a second warning would be an error
        assert run.kept().shape == (2, 1, 18) and run.kept().all()
        padded_ids, padding = padded([tokens(17), tokens(12)])
        model(padded_ids, attention_mask=padding)
        assert torch.equal(run.kept(), padding.bool().expand(2, -1, -1))
        with pytest.warns(UserWarning, match="keep only the 20 protected ones"):
            model(tokens(1, 40))
        assert len(run.stages) == 2
        short, mask = padded([tokens(30), tokens(12)])
        model(short, attention_mask=mask)
        assert run.kept()[-1].sum(-1).tolist() == [20, 12]


def test_stages_that_keep_only_what_is_protected_are_named_once():
    model, pruner = shared(), prompt_pruner([0.7, 0.2])
    with pruner.prefill(model):
        with pytest.warns(UserWarning, match=r"96 tokens the stages after layers \[3\] keep only the 20 protected"):
            model(tokens(1, 96))
        model(tokens(1, 90))
    with prompt_pruner([0.7, 0.2], of="free").prefill(model):
        model(tokens(1, 96))


def test_before_any_prompt_nothing_is_kept():
    with prompt_pruner().prefill(shared()) as run:
        assert run.kept().shape == (2, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_prunes_generates_and_agrees_with_float32(dtype):
    model, ids = build().to(dtype), tokens(1, N)
    with prompt_pruner().prefill(shared()) as run:
        wanted, kept = shared()(ids).logits[0, -1], run.kept()
    with prompt_pruner().prefill(model) as run:
        found = model(ids).logits[0, -1]
        assert model.generate(ids, **GREEDY).shape == (1, N + 5)
        assert run.kept().sum() == kept.sum() and (run.kept() == kept).float().mean() > 0.9
    assert F.cosine_similarity(found.float(), wanted, dim=0) > 0.9


@torch.no_grad()
def test_protected_spans_survive_every_stage():
    with prompt_pruner(0.2, of="free", spans=[(30, 45)]).prefill(shared()) as run:
        shared()(tokens(2, N))
    assert run.kept()[:, :, [*range(4), *range(30, 45), *range(N - 16, N)]].all()
