"""The dense model with removed parts zeroed equals the sliced one; mistakes do not."""

import dataclasses

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_modules.structured_pruning.importance.base import best
from lightning_modules.structured_pruning.importance.per_tensor_truncation import PerTensorTruncation
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.masking import masked
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.verify import (
    compare,
    exact_logits,
    in_float64,
    reference_logits,
    removed_parts_zeroed,
)
from tests.lightning_modules.structured_pruning.toy import DROPPED, KEPT, ids, plan_for, tiny

BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("kept", [KEPT, DROPPED], ids=["parts", "a whole layer"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [("llama", {}), ("llama", BIASED), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("mistral", {})],
    ids=["llama", "llama with biases", "tied", "qwen2", "mistral"],
)
def test_zeroed_equals_sliced(name, fields, kept):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        dense = tiny(name, dtype, **fields)
        plan = plan_for(dense, kept)
        result = compare(*reference_logits(dense, plan, ids()), slice_model(dense, plan), ids(), 1e-6)
        result.raise_if_failed()
        assert result.zeroed_and_sliced < 1e-9 and result.pruned_and_dense > 0.1


def test_masking_computes_what_slicing_does():
    for kept in (KEPT, DROPPED):
        dense = tiny("llama", torch.float64, **BIASED)
        plan = plan_for(dense, kept)
        with torch.no_grad(), masked(dense, plan):
            logits = dense(ids()).logits
        assert torch.allclose(logits, slice_model(dense, plan)(ids()).logits, atol=1e-12)


def test_the_model_is_as_before_afterwards():
    dense = tiny("qwen2")
    before, logits = model_hash(dense), dense(ids()).logits
    with pytest.raises(RuntimeError, match="on purpose"), removed_parts_zeroed(dense, plan_for(dense)):
        assert model_hash(dense) != before
        raise RuntimeError("on purpose")
    slice_model(dense, plan_for(dense))
    assert model_hash(dense) == before and torch.equal(dense(ids()).logits, logits)


def test_removing_nothing_is_refused_as_no_proof():
    dense = tiny()
    plan = plan_for(dense, [LayerPlan([0, 1, 2, 3], list(range(48)))] * 4)
    result = compare(*reference_logits(dense, plan, ids()), slice_model(dense, plan), ids(), 1e-6)
    with pytest.raises(ValueError, match="pruning changed nothing"):
        result.raise_if_failed()


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_head_in_the_wrong_place_is_caught(projection):
    dense = tiny()
    plan = plan_for(dense)
    sliced = slice_model(dense, plan)
    attention = sliced.model.layers[1].self_attn
    weight = getattr(attention, projection).weight
    weight.data = weight.data.roll(attention.head_dim, 1 if projection == "o_proj" else 0)
    with pytest.raises(ValueError, match="verify: logits of the sliced model differ"):
        compare(*reference_logits(dense, plan, ids()), sliced, ids(), 1e-6).raise_if_failed()


def test_a_single_head_can_be_seen_to_stand_right():
    dense = tiny(num_attention_heads=8, num_key_value_heads=8)
    plan = plan_for(dense, [LayerPlan([2], list(range(24)))] * 4)
    compare(*reference_logits(dense, plan, ids()), slice_model(dense, plan), ids(), 1e-6).raise_if_failed()


def test_queries_truncated_without_their_keys_fail():
    dense = tiny()
    layer = dataclasses.replace(KEPT[1], query_heads=PerTensorTruncation().query_heads(KEPT[1].groups, 2))
    assert layer.query_heads == [0, 1, 2, 3]  # groups 0 and 2 are read by heads 0, 1, 4 and 5
    plan = plan_for(dense, [KEPT[0], layer, *KEPT[2:]])
    result = compare(*reference_logits(dense, plan, ids()), slice_model(dense, plan), ids(), 1e-6)
    with pytest.raises(ValueError, match="query heads do not belong"):
        result.raise_if_failed()


def test_half_precision_comes_back_bit_by_bit():
    model = tiny(dtype=torch.bfloat16, tie_word_embeddings=True)
    before, held = model_hash(model), [p.data_ptr() for p in model.parameters()]
    assert exact_logits(model, ids()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="on purpose"), in_float64(model):
        model.model.layers[2].mlp.register_forward_pre_hook(
            lambda m, a: (_ for _ in ()).throw(RuntimeError("on purpose"))
        )
        model(ids())
    assert model_hash(model) == before and [p.data_ptr() for p in model.parameters()] == held
    assert slice_model(model, plan_for(model)).dtype == torch.bfloat16


def test_a_kernel_that_knows_half_precision_alone_is_stood_in_for(monkeypatch):
    """As flash attention is."""
    model = tiny(dtype=torch.bfloat16)
    wanted = exact_logits(model, ids())

    def halves_only(module, query, *args, **kwargs):
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("only support fp16 and bf16 data type")
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "halves_only", halves_only)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "halves_only", sdpa_mask)
    model.config._attn_implementation = "halves_only"
    half = model(ids()).logits
    assert torch.equal(exact_logits(model, ids()), wanted)
    assert model.config._attn_implementation == "halves_only" and torch.equal(model(ids()).logits, half)
    with pytest.raises(RuntimeError, match="on purpose"), in_float64(model):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "halves_only"
    dense = tiny(dtype=torch.bfloat16)
    plan = plan_for(dense)
    sliced = slice_model(dense, plan)
    sliced.config._attn_implementation = "halves_only"
    compare(*reference_logits(dense, plan, ids()), sliced, ids(), 1e-6).raise_if_failed()


def test_only_the_module_at_work_is_wide():
    model = tiny("qwen2", torch.bfloat16)
    wide = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda m, a: wide.append([p.dtype == torch.float64 for p in model.parameters()].count(True))
        )
    exact_logits(model, ids())
    assert wide == [len(list(layer.parameters())) for layer in model.model.layers]


def test_shapes_count_what_is_there():
    for name, fields in (("llama", {}), ("llama", BIASED), ("qwen2", {}), ("mistral", {})):
        dense = tiny(name, **fields)
        sliced = slice_model(dense, plan_for(dense))
        for before, after in zip(decoder_layers(dense), decoder_layers(sliced), strict=True):
            old, new = shape_of(before), shape_of(after)
            fewer = (old.groups - new.groups) * old.group_parameters
            assert new.parameters == old.parameters - fewer - (old.channels - new.channels) * old.channel_parameters


def test_best_are_the_highest_in_order():
    assert best(torch.tensor([3.0, 1.0, 3.0, 5.0]), 2) == [0, 3]
