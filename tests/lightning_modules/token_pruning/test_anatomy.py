"""Attribute names of transformers' models: an upgrade that moves one must fail here, not in a user's run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_modules.token_pruning.anatomy import SUPPORTED, UnsupportedModelError, anatomy, input_device, placement
from tests.lightning_modules.token_pruning.models import HIDDEN, LAYERS, build, shared, tokens

families = pytest.mark.parametrize("family", SUPPORTED)


@families
def test_layers_and_norm_are_the_ones_that_run(family):
    model = shared(family)
    parts = anatomy(model)
    ran = []
    handles = [
        module.register_forward_hook(lambda module, *_: ran.append(module)) for module in (*parts.layers, parts.norm)
    ]
    with torch.no_grad():
        model(tokens(1, 8))
    for handle in handles:
        handle.remove()
    assert ran == [*parts.layers, parts.norm] and len(parts.layers) == LAYERS and parts.hidden_size == HIDDEN


@families
def test_layers_take_what_pruning_replaces(family):
    parts = anatomy(shared(family))
    assert {"hidden_states", "attention_mask", parts.cache_argument} <= set(parts.arguments)
    assert (family == "gpt2") != ("position_embeddings" in parts.arguments)


def _seen_by_attention(model, ids):
    """Inputs of every layer, and the queries that reach the attention kernel."""
    parts, inputs, queries = anatomy(model), [], []
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, *args, **kwargs):
        queries.append(query)
        return kernel(module, query, *args, **kwargs)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args[0], kwargs)), with_kwargs=True)
        for layer in parts.layers
    ]
    cache = DynamicCache()
    ALL_ATTENTION_FUNCTIONS.register("sdpa", spy)
    try:
        model(ids, past_key_values=cache, use_cache=True)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", kernel)
        for handle in handles:
            handle.remove()
    return parts, inputs, queries, cache


@families
@torch.no_grad()
def test_queries_and_keys_are_the_models_own(family):
    parts, inputs, queries, cache = _seen_by_attention(shared(family), tokens(2, 12))
    for layer, (hidden, kwargs) in enumerate(inputs):
        rotary = kwargs.get("position_embeddings")
        torch.testing.assert_close(parts.queries(layer, hidden, rotary), queries[layer])
        torch.testing.assert_close(parts.keys(layer, hidden, rotary), cache.layers[layer].keys)


def test_partial_rotation_leaves_the_other_channels_alone():
    model = build("gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    with torch.no_grad():
        parts, inputs, queries, _ = _seen_by_attention(model, tokens(1, 12))
        hidden, kwargs = inputs[1]
        torch.testing.assert_close(parts.queries(1, hidden, kwargs["position_embeddings"]), queries[1])


def test_another_architecture_is_refused_with_the_list():
    config = AutoConfig.for_model("bloom", vocab_size=99, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(UnsupportedModelError, match=r"'bloom'.*llama, mistral, qwen2, qwen3, phi3, gpt_neox, gpt2"):
        anatomy(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 128}),
        ("phi3", {"sliding_window": 128}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}),
    ],
)
def test_sliding_windows_are_refused_with_the_reason(family, fields):
    with pytest.raises(UnsupportedModelError, match=r"sliding-window.*cache entries.*supported: llama"):
        anatomy(build(family, **fields))


_ENDS = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1}


@pytest.mark.parametrize(
    ("places", "devices", "layers", "offloaded"),
    [
        ({"": "cpu"}, ["cpu"], ["cpu"] * 3, []),
        ({"": 1}, ["cuda:1"], ["cuda:1"] * 3, []),
        ({**_ENDS, "model.layers": 0, "model.layers.1": 1}, ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1", "cuda:0"], []),
        (
            {**_ENDS, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk"},
            ["cuda:0", "cuda:1"],
            ["cuda:0", "cpu", "disk"],
            ["model.layers.1", "model.layers.2"],
        ),
        ({"": "cpu", "model.layers.1.mlp": "disk"}, ["cpu"], ["cpu", "cpu+disk", "cpu"], ["model.layers.1.mlp"]),
    ],
)
def test_a_device_map_is_told_by_layer_and_what_is_offloaded_is_named(places, devices, layers, offloaded):
    model = build(layers=3)
    model.hf_device_map = places
    assert placement(model) == {"devices": devices, "layers": layers, "offloaded": offloaded}
    assert str(input_device(model)) == devices[0]


def test_a_model_on_one_device_has_one_place():
    assert placement(shared()) == {"devices": ["cpu"], "layers": ["cpu"] * LAYERS, "offloaded": []}
