"""Peers: what each chooses, that the model goes on from just that, and what it costs."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

from common.variants import variants
from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers import Peer
from lightning_modules.token_pruning.peers.cache_selection import CacheSelection
from lightning_modules.token_pruning.peers.expected_attention import ExpectedAttention
from lightning_modules.token_pruning.peers.fast_kv import FastKV
from lightning_modules.token_pruning.peers.gem_filter import GemFilter
from lightning_modules.token_pruning.peers.llm_lingua import LLMLingua
from lightning_modules.token_pruning.peers.random_cache import RandomCache
from lightning_modules.token_pruning.peers.snap_kv import SnapKV
from lightning_modules.token_pruning.peers.spec_prefill import SpecPrefill
from lightning_modules.token_pruning.peers.streaming_llm import StreamingLLM
from lightning_modules.token_pruning.peers.text_dropping import TextDropping
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.scorers.recency import Recency
from tests.lightning_modules.token_pruning.models import LAYERS, VOCABULARY, build, shared, tokens
from tests.lightning_modules.token_pruning.oracle import masked_logits

N, GREEDY = 96, {"max_new_tokens": 5, "do_sample": False}
FEW = [("llama", "sdpa"), ("llama", "eager"), ("smollm3", "sdpa"), ("gpt_neox", "eager"), ("gpt2", "sdpa")]
FEW += [("gemma3_text", "sdpa"), ("gemma2", "eager")]
everywhere = pytest.mark.parametrize(("family", "kernel"), FEW)
SELECTIONS = [
    SnapKV(0.3, window=8),
    ExpectedAttention(0.4, future=32, epsilon=0.02),
    RandomCache(0.3, window=8),
    StreamingLLM(0.2),
    FastKV(2, 0.4, SnapKV(0.3, window=8, kernel=7), min_tail=8, tail=0.0),
    FastKV(1, 0.3, SnapKV(0.5, window=8, kernel=7), min_tail=8, tail=0.0),
]
RENUMBERED = [GemFilter(1, 0.4, min_tail=8, tail=0.0), LLMLingua(0.4, min_tail=8, tail=0.0, pool=3)]


def _tokenizer(words):
    coded = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=coded, unk_token=words[0])


WORDS = [f"w{number}" for number in range(190)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A smaller model with its tokenizer."""
    path = tmp_path_factory.mktemp("draft")
    build("qwen2", layers=2).save_pretrained(path)
    _tokenizer(WORDS).save_pretrained(path)
    return str(path)


def _known():
    return [cls for cls in variants(Peer) if cls.__module__.startswith("lightning_modules.")]


def test_every_peer_of_the_list_is_there():
    wanted = {SnapKV, ExpectedAttention, FastKV, GemFilter, SpecPrefill, LLMLingua, RandomCache, StreamingLLM}
    assert wanted <= set(_known())
    for cls in _known():
        for example in cls.examples():
            assert repr(cls(**example.arguments())) == repr(example)


def _turns(model, peer, ids, later):
    """Logits of a prompt's last token and of all later ones, the cache, and what happened."""
    cache, got = DynamicCache(), []
    with peer.prefill(model) as run:
        for chunk in (ids, *later):
            got.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    assert got[0].shape[1] == ids.shape[1]
    return torch.cat([got[0][:, -1:], *got[1:]], dim=1), cache, run


LATER = [tokens(1, 1, seed=5), tokens(1, 1, seed=6), tokens(1, 12, seed=7)]


def _hooks(model):
    """What hangs on a model's modules; transformers leaves hooks of its own once attentions were asked for."""
    return [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]


@everywhere
@torch.no_grad()
def test_keeping_all_changes_no_bit(family, kernel, folder):
    model, ids = shared(family, kernel), tokens(1, N)
    wanted, text = model(ids).logits, model.generate(ids, **GREEDY)
    before = _hooks(model)
    peers = [cls(keep=1.0) for cls in (SnapKV, ExpectedAttention, RandomCache, StreamingLLM, LLMLingua)]
    peers += [FastKV(1, 1.0, SnapKV(1.0)), GemFilter(1, 1.0), SpecPrefill(folder, 1.0)]
    for peer in peers:
        with peer.prefill(model):
            assert torch.equal(model(ids).logits, wanted) and torch.equal(model.generate(ids, **GREEDY), text)
        assert peer.entries(N, LAYERS) == [N] * LAYERS and peer.bound(Cost.of(model), N) == 1.0
    assert _hooks(model) == before
    assert "generate" not in vars(model)


# ---- selection of cache entries ---------------------------------------------------------------------------------


@contextmanager
def _masks(model, visible):
    """Every layer attends as its own mask [1 or A, T, T] says; nothing is removed."""
    parts = anatomy(model)

    def hook(allowed):
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None]

        def before(_, args, kwargs):
            call = dict(zip(parts.arguments, args, strict=False)) | kwargs
            return (call.pop("hidden_states"),), call | {"attention_mask": mask}

        return before

    handles = [
        layer.register_forward_pre_hook(hook(allowed), with_kwargs=True)
        for layer, allowed in zip(parts.layers, visible, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


def _heads(model):
    config = model.config
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@everywhere
@pytest.mark.parametrize("peer", SELECTIONS, ids=repr)
@torch.no_grad()
def test_selected_equals_masked_head_by_head_through_decoding_and_a_second_turn(peer, family, kernel):
    model, ids = shared(family, kernel), tokens(1, N)
    got, cache, run = _turns(model, peer, ids, LATER)
    read = torch.ones(LAYERS, N, dtype=torch.bool)
    if isinstance(peer, FastKV):
        with PromptPruner(peer.scorer, peer.schedule).prefill(model) as pruned:
            model(ids)
        read[peer.layer + 1 :] = pruned.kept()[0, 0]
    sequence = torch.cat([ids, *LATER], dim=1)
    width, (heads, groups) = sequence.shape[1], _heads(model)
    visible = []
    for layer in range(LAYERS):
        allowed = torch.ones(width, width, dtype=torch.bool).tril().repeat(heads, 1, 1)
        allowed[:, :, :N] &= read[layer]
        if layer in run.kept:
            places = read[layer].nonzero()[:, 0][run.kept[layer]]
            held = torch.zeros(groups, N, dtype=torch.bool).scatter(1, places, True)
            allowed[:, N:, :N] &= held.repeat_interleave(heads // groups, 0)[:, None]
        visible.append(allowed | torch.eye(width, dtype=torch.bool))
    with _masks(model, visible):
        wanted = model(sequence, use_cache=False).logits[:, N - 1 :]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    entries = peer.entries(N, LAYERS)
    assert [layer.get_seq_length() - 14 for layer in cache.layers] == entries
    assert min(entries) < N and peer.kv_share(N, LAYERS) == pytest.approx(sum(entries) / (N * LAYERS))
    if groups > 1 and not isinstance(peer, StreamingLLM):
        assert any(not torch.equal(*chosen[:2]) for chosen in run.kept.values())


@pytest.mark.parametrize("peer", SELECTIONS, ids=repr)
@torch.no_grad()
def test_generate_goes_on_as_a_loop_by_hand_does(peer):
    model, ids = shared("llama", "eager"), tokens(1, N)
    with peer.prefill(model):
        if hasattr(peer, "_generator"):
            peer._generator.manual_seed(peer.seed)
        text = model.generate(ids, **GREEDY)
    if hasattr(peer, "_generator"):
        peer._generator.manual_seed(peer.seed)
    logits, *_ = _turns(model, peer, ids, [text[:, place : place + 1] for place in range(N, N + 4)])
    assert torch.equal(logits.argmax(-1), text[:, N:])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_snap_kv_keeps_what_the_last_tokens_attend_to(family):
    model, ids = shared(family, "eager"), tokens(1, N)
    attention = model(ids, output_attentions=True).attentions
    _, _, run = _turns(model, SnapKV(0.3, window=8, kernel=3), ids, [])
    heads, groups = _heads(model)
    for layer, paid in enumerate(attention):
        asked = F.pad(paid[0, :, -8:, : N - 8].mean(1), (1, 1))
        smooth = (asked[:, :-2] + asked[:, 1:-1] + asked[:, 2:]) / 3
        score = smooth.view(groups, heads // groups, -1).mean(1)
        for group in range(groups):
            best = score[group].argsort(descending=True)[: 29 - 8].tolist()
            assert run.kept[layer][group].tolist() == [*sorted(best), *range(N - 8, N)]


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
@torch.no_grad()
def test_expected_attention_is_that_of_rotated_normal_queries(epsilon, family="llama"):
    """By hand: every future position's rotation matrix, each score in a loop."""
    model, ids = shared(family), tokens(1, 40)
    peer, parts = ExpectedAttention(0.5, future=7, sinks=2, epsilon=epsilon), anatomy(model)
    cache, states = DynamicCache(), model(ids, output_hidden_states=True).hidden_states
    model(ids, past_key_values=cache)
    _, _, run = _turns(model, peer, ids, [])
    width, frequency = 16, model.model.rotary_emb.inv_freq
    mean_rotation = torch.zeros(width, width)
    for position in range(40, 47):
        for place, angle in enumerate(position * frequency):
            a, b = place, place + width // 2
            mean_rotation[a, a] += angle.cos() / 7
            mean_rotation[b, b] += angle.cos() / 7
            mean_rotation[a, b] -= angle.sin() / 7
            mean_rotation[b, a] += angle.sin() / 7
    for layer in range(LAYERS):
        module = model.model.layers[layer]
        queries = module.self_attn.q_proj(module.input_layernorm(states[layer]))[0, 2:].view(38, 4, width)
        keys, values = cache.layers[layer].keys[0, :, 2:], cache.layers[layer].values[0, :, 2:]
        for group in range(2):
            paid = torch.zeros(38)
            for head in (2 * group, 2 * group + 1):
                mean = mean_rotation @ queries[:, head].mean(0)
                spread = mean_rotation @ queries[:, head].T.cov(correction=0) @ mean_rotation.T
                logits = torch.stack([mean @ key / 4 + key @ spread @ key / 32 for key in keys[group]])
                paid += logits.softmax(0) / 2
            score = (paid + epsilon) * values[group].norm(dim=-1)
            best = (score.argsort(descending=True)[:18] + 2).tolist()
            assert run.kept[layer][group].tolist() == [0, 1, *sorted(best)]
    assert parts.rotary(states[0], torch.arange(3)[None])[0].shape == (1, 3, width)


def test_streaming_llm_keeps_both_ends_and_random_draws_anew():
    model, ids = shared(), tokens(1, N)
    _, _, run = _turns(model, StreamingLLM(0.25, sinks=3), ids, [])
    assert run.kept[4].tolist() == [[0, 1, 2, *range(N - 21, N)]] * 2
    peer = RandomCache(0.5, window=4)
    first, second = (_turns(model, peer, ids, [])[2].kept for _ in range(2))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], first[1])
    assert torch.equal(first[3], _turns(model, RandomCache(0.5, window=4), ids, [])[2].kept[3])


# ---- text dropping ----------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("peer", RENUMBERED, ids=repr)
@torch.no_grad()
def test_what_is_left_is_read_as_a_text_of_its_own(peer, family, kernel):
    model, ids = shared(family, kernel), tokens(1, N)
    got, cache, run = _turns(model, peer, ids, LATER)
    assert len(run.kept) == peer.entries(N, LAYERS)[0] == 12 + 34
    assert run.kept[:4].tolist() == [0, 1, 2, 3] and run.kept[-8:].tolist() == [*range(N - 8, N)]
    sequence = torch.cat([ids[:, run.kept], *LATER], dim=1)
    wanted = model(sequence).logits[:, len(run.kept) - 1 :]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert [layer.get_seq_length() - 14 for layer in cache.layers] == peer.entries(N, LAYERS)
    with peer.prefill(model):
        text = model.generate(ids, **GREEDY)
    alone = model.generate(ids[:, run.kept], **GREEDY)
    assert torch.equal(text[:, :N], ids) and torch.equal(text[:, N:], alone[:, len(run.kept) :])


@everywhere
@torch.no_grad()
def test_spec_prefill_keeps_positions(family, kernel, folder):
    model, ids = shared(family, kernel), tokens(1, N)
    peer = SpecPrefill(folder, 0.4, min_tail=8, tail=0.0)
    got, cache, run = _turns(model, peer, ids, LATER)
    kept = torch.zeros(1, 1, N, dtype=torch.bool)
    kept[0, 0, run.kept] = True
    assert kept.sum() == 46 and kept[0, 0, -8:].all()
    wanted = masked_logits(model, torch.cat([ids, *LATER], dim=1), [-1], kept)[:, N - 1 :]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    with peer.prefill(model):  # no cache, no mask: gaps are no borders
        again = model(ids, use_cache=False).logits[:, -1:]
        text = model.generate(ids, **GREEDY)
    torch.testing.assert_close(again, wanted[:, :1], atol=1e-5, rtol=1e-5)
    steps = [text[:, place : place + 1] for place in range(N, N + 4)]
    assert torch.equal(_turns(model, peer, ids, steps)[0].argmax(-1), text[:, N:])
    assert cache.get_seq_length() == 46 + 14


@torch.no_grad()
def test_spec_prefill_keeps_what_the_draft_attends_to(folder):
    draft, ids = build("qwen2", "eager", layers=2), tokens(1, N)
    peer = SpecPrefill(folder, 0.4, window=6, min_tail=8, tail=0.0, pool=3)
    _, _, run = _turns(shared(), peer, ids, [])
    best = torch.zeros(6, N)
    for paid in draft(ids, output_attentions=True).attentions:
        inner = paid[0, :, -6:, 4 : N - 8]  # what is protected counts for no mean
        padded, counted = F.pad(inner, (1, 1)), F.pad(torch.ones(N - 12), (1, 1))
        total = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
        best[:, 4 : N - 8] = best[:, 4 : N - 8].maximum((total / (counted[:-2] + 1 + counted[2:])).amax(0))
    wanted = best.mean(0)[4 : N - 8].argsort(descending=True)[:34] + 4
    assert run.kept.tolist() == [0, 1, 2, 3, *sorted(wanted.tolist()), *range(N - 8, N)]


@pytest.mark.parametrize("drafted", [False, True])
@torch.no_grad()
def test_llm_lingua_keeps_what_could_not_be_guessed(drafted, folder):
    model, ids = shared(), tokens(1, N)
    peer = LLMLingua(0.4, folder if drafted else None, sinks=0, min_tail=8, tail=0.0)
    _, _, run = _turns(model, peer, ids, [])
    odds = (build("qwen2", layers=2) if drafted else model)(ids).logits[0].log_softmax(-1)
    nats = [torch.tensor(VOCABULARY).log().item()]
    nats += [-odds[place - 1, ids[0, place]].item() for place in range(1, N)]
    wanted = sorted(range(N - 8), key=lambda place: -nats[place])[:36]
    assert run.kept.tolist() == [*sorted(wanted), *range(N - 8, N)]


@torch.no_grad()
def test_gem_filter_selects_as_its_scorer_does_and_stops_there():
    model, ids = shared(), tokens(1, N)
    peer, calls = RENUMBERED[0], []
    handles = [
        layer.register_forward_hook(lambda _, args, __, index=index: calls.append((index, args[0].shape[1])))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        _, _, run = _turns(model, peer, ids, [])
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [(0, N), (1, N), *((layer, 46) for layer in range(LAYERS))]
    with PromptPruner(peer.scorer, peer.schedule).prefill(model) as pruned:
        model(ids)
    assert torch.equal(run.kept, pruned.stages[0].index[0])


# ---- cost -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_operations_are_those_that_run(folder):
    model, ids = shared("llama", "eager"), tokens(1, N)
    cost, per = Cost.of(model), [4.0 * 64] * LAYERS
    fields = {"min_tail": 8, "tail": 0.0}
    # beside what a bound counts: the other half of eager attention's square, of each pass
    passes = {
        GemFilter(1, 0.4, Recency(), **fields): [N, N, *[46] * LAYERS],
        LLMLingua(0.4, **fields): [N] * LAYERS + [46] * LAYERS,
        LLMLingua(0.4, folder, **fields): [N] * 2 + [46] * LAYERS,
        SpecPrefill(folder, 0.4, window=1, pool=1, **fields): [N] * 2 + [46] * LAYERS,
        FastKV(2, 0.4, StreamingLLM(0.5), Recency(), **fields): [N] * 3 + [46] * 3,
        StreamingLLM(0.2): [N] * LAYERS,
    }
    for peer, lengths in passes.items():
        cache = DynamicCache()
        with peer.prefill(model):
            if hasattr(peer, "_draft") and peer._draft is not None:
                peer._draft.beside(model).set_attn_implementation("eager")
            with FlopCounterMode(display=False) as counter:
                model(ids, past_key_values=cache, logits_to_keep=1)
        square = sum(per[0] * n * n / 2 for n in lengths)
        expected = cost.prefill([N] * LAYERS) / peer.bound(cost, N)
        assert counter.get_total_flops() == pytest.approx(expected + square, rel=0.03), peer


def test_selecting_entries_saves_no_prefill_time_and_reading_twice_may_cost_more(folder):
    cost = Cost.of(shared())
    assert all(peer.bound(cost, 500) == 1.0 for peer in SELECTIONS if isinstance(peer, CacheSelection))
    assert LLMLingua(0.5).bound(cost, 500) < 1 < LLMLingua(0.5, folder).bound(cost, 500)
    assert GemFilter(4, 0.5).bound(cost, 500) < GemFilter(0, 0.5).bound(cost, 500)
    assert SpecPrefill(folder, 0.3).bound(cost, 500) > SpecPrefill(folder, 0.5).bound(cost, 500)


# ---- what is refused --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_a_decoder_is_given_by_position_arrives():
    model, ids = shared(), tokens(1, N)
    places = 2 * torch.arange(N)[None]
    wanted = model.model(ids, None, places).last_hidden_state
    with SnapKV().prefill(model):
        assert torch.equal(model.model(ids, None, places).last_hidden_state, wanted)


@pytest.mark.parametrize("peer", [SnapKV(window=8), FastKV(1, min_tail=8), *RENUMBERED], ids=repr)
@torch.no_grad()
def test_what_a_peer_cannot_read_is_refused_by_name(peer):
    model, ids = shared(), tokens(1, N)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    filled = DynamicCache()
    model(tokens(1, 5), past_key_values=filled)
    static = StaticCache(config=model.config, max_cache_len=200)
    name = type(peer).__name__
    with peer.prefill(model):
        for reads, why in (
            (lambda: model(tokens(2, N)), f"{name} reads one prompt at a time, not a batch of 2"),
            (lambda: model.generate(ids, num_beams=2, **GREEDY), "one prompt at a time, not a batch of 2"),
            (lambda: model(ids, attention_mask=mask), f"{name} reads prompts without padding"),
            (lambda: model(ids[:, :0]), "empty prompt"),
            (lambda: model(ids, past_key_values=filled), "an empty cache, and this one holds 5 tokens"),
            (lambda: model(ids, past_key_values=static), "needs a DynamicCache, not StaticCache"),
            (lambda: model.generate(ids, use_cache=False, **GREEDY), "generate needs a cache"),
            (lambda: model.generate(ids, prefill_chunk_size=32, **GREEDY), "prefill_chunk_size"),
        ):
            with pytest.raises(ValueError, match=why):
                reads()
        with pytest.raises(RuntimeError, match="cannot be nested"), SnapKV().prefill(model):
            pass
        if isinstance(peer, TextDropping):
            with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
                model(inputs_embeds=model.get_input_embeddings()(ids))
        text = model.generate(ids, **GREEDY)  # and goes on
    with peer.prefill(model):
        assert torch.equal(model.generate(ids, **GREEDY), text)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: SnapKV(0.0), "keep must be within"),
        (lambda: SnapKV(window=0), "window must be at least 1"),
        (lambda: SnapKV(kernel=4), "kernel odd"),
        (lambda: ExpectedAttention(1.5), "keep must be within"),
        (lambda: ExpectedAttention(future=0), "future must be at least 1"),
        (lambda: RandomCache(window=-1), "window must not be negative"),
        (lambda: StreamingLLM(sinks=-1), "sinks must not be negative"),
        (lambda: GemFilter(2, keep=0.0), "keep must be within"),
        (lambda: GemFilter(2, pool=4), "pool must be odd"),
        (lambda: SpecPrefill("x", pool=2), "pool must be odd"),
        (lambda: SpecPrefill("x", window=40), "window must lie within 1 … min_tail 32"),
        (lambda: GemFilter(5).prefill(shared()).__enter__(), "are not all within 0 … 4"),
        (lambda: FastKV(7).prefill(shared()).__enter__(), "are not all within 0 … 4"),
        (lambda: SnapKV(0.1, window=16).entries(96, 6), "is 10 entries, fewer than the 16 that always stay"),
        (lambda: _turns(shared(), SnapKV(0.1, window=16), tokens(1, N), []), "fewer than the 16 that always stay"),
    ],
)
def test_bad_arguments_are_named(make, why):
    with pytest.raises(ValueError, match=why):
        make()


@torch.no_grad()
def test_a_draft_with_other_tokens_is_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError), SpecPrefill("./nowhere").prefill(shared()):
        pass
    ids, peer = tokens(1, N), SpecPrefill(folder, min_tail=8)
    other = build(vocab_size=VOCABULARY + 1)
    with peer.prefill(other), pytest.raises(ValueError, match=f"draft: {folder} does not read in the tokens of"):
        other(ids)
    _tokenizer(WORDS[::-1]).save_pretrained(tmp_path)
    other = build()
    other.save_pretrained(tmp_path)
    other.name_or_path = str(tmp_path)
    for drafting in (peer, LLMLingua(0.5, folder, min_tail=8)):
        with drafting.prefill(other), pytest.raises(ValueError, match=r"draft: .* have other numbers"):
            other(ids)
    _tokenizer(WORDS).save_pretrained(tmp_path)
    with peer.prefill(other):
        other(ids)
