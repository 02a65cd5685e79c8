"""Attribute names of transformers' models: an upgrade that moves one must fail here, not in a user's run."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.token_pruning.anatomy import (
    SUPPORTED,
    UnsupportedModelError,
    anatomy,
    check_supported,
    input_device,
    layer_devices,
    placement,
)
from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.scorers.base import Context
from lightning_modules.token_pruning.scorers.last_window import LastWindow
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


def _seen_by_attention(model, ids, monkeypatch):
    """Inputs of every layer, queries and keys that reach its attention, and the probabilities there."""
    parts, inputs, seen, found = anatomy(model), [], [], []
    home = sys.modules[type(parts.attention(0)).__module__]
    kernel = home.eager_attention_forward

    def spy(module, query, key, *args, **kwargs):
        seen.append((query, key))
        output, probabilities = kernel(module, query, key, *args, **kwargs)
        found.append(probabilities)
        return output, probabilities

    monkeypatch.setattr(home, "eager_attention_forward", spy)
    for layer in parts.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args[0], kwargs)), with_kwargs=True)
    model(ids)
    return parts, inputs, seen, found


@families
@torch.no_grad()
def test_queries_keys_and_attention_are_the_models_own(family, monkeypatch):
    parts, inputs, seen, found = _seen_by_attention(build(family, "eager"), tokens(2, 12), monkeypatch)
    assert len(seen) == LAYERS
    for layer, (hidden, kwargs) in enumerate(inputs):
        rotary = kwargs.get("position_embeddings")
        torch.testing.assert_close(parts.queries(layer, hidden, rotary), seen[layer][0])
        torch.testing.assert_close(parts.keys(layer, hidden, rotary), seen[layer][1])
        paid = tail_attention(parts, layer, hidden, 5, rotary, None)
        torch.testing.assert_close(paid, found[layer][:, :, -5:], atol=1e-6, rtol=1e-5)
        some = tail_attention(parts, layer, hidden, 5, rotary, None, heads=[3, 0, 1])
        torch.testing.assert_close(some, found[layer][:, [3, 0, 1], -5:], atol=1e-6, rtol=1e-5)


class _Calls(TorchDispatchMode):
    """Remembers operations, and the shapes of what a softmax is taken of."""

    def __init__(self):
        super().__init__()
        self.names, self.softmaxed = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names.add(name)
        if name == "_softmax":
            self.softmaxed.append(tuple(args[0].flatten(1, -3).shape))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_attention_of_some_heads_costs_as_many_and_copies_no_index_to_the_device():
    scorer = LastWindow(8, only={2: [3, 1]})
    parts, hidden, places = anatomy(shared()), torch.randn(1, 40, HIDDEN), torch.arange(40)[None]
    none = torch.zeros(1, 40, dtype=torch.bool)
    context = Context(parts, places, None, none, (40,), parts.rotary(hidden, places))
    with _Calls() as calls:
        scorer.score(hidden, 1, context)
    assert calls.softmaxed == [(1, 2, 8, 40)] and "index" not in calls.names


@torch.no_grad()
def test_attention_holds_in_half_precision_where_unscaled_products_do_not():
    torch.manual_seed(0)
    model, hidden = build(), torch.randn(1, 12, HIDDEN)
    parts = anatomy(model)
    rotary = parts.rotary(hidden, torch.arange(12)[None])
    queries, keys = parts.queries(1, hidden, rotary), parts.keys(1, hidden, rotary)
    most = (queries.unflatten(1, (2, 2)) @ keys[:, :, None].mT).abs().max()
    parts.attention(1).q_proj.weight.mul_(1e5 / most)  # 65504 is the greatest number there
    wanted = tail_attention(parts, 1, hidden, 5, rotary, None)
    model.half()
    halves = (rotary[0].half(), rotary[1].half())
    found = tail_attention(parts, 1, hidden.half(), 5, halves, None)
    assert found.isfinite().all() and (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


def test_partial_rotation_leaves_the_other_channels_alone(monkeypatch):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with torch.no_grad():
        model = build("gpt_neox", "eager", rope_parameters=rope)
        parts, inputs, seen, _ = _seen_by_attention(model, tokens(1, 12), monkeypatch)
        hidden, kwargs = inputs[1]
        torch.testing.assert_close(parts.queries(1, hidden, kwargs["position_embeddings"]), seen[1][0])


def test_another_architecture_is_refused_with_the_list():
    config = AutoConfig.for_model("bloom", vocab_size=99, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(UnsupportedModelError, match=rf"'bloom'.*{', '.join(SUPPORTED)}"):
        anatomy(AutoModelForCausalLM.from_config(config))


_SLIDING, _FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("mistral", {"sliding_window": 128}, r"in 6 of 6 layers.*layer, 5,.* 0 others"),
        ("mixtral", {"sliding_window": 128}, r"in 6 of 6 layers.*layer, 5,.* 0 others"),
        ("phi3", {"sliding_window": 128}, r"in 6 of 6 layers.*layer, 5,.* 0 others"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2},
            r"in 4 of 6 layers.*layer, 5,.* 0 others",
        ),
        (
            "gemma2",
            {"layer_types": [_SLIDING, _FULL] * 3},
            r"in 3 of 6 layers.*layer, 4,.* 1 others",
        ),
        (
            "gemma3_text",
            {"layer_types": [_SLIDING] * 4 + [_FULL] * 2},
            r"in 4 of 6 layers.*layer, 3,.* 2 others",
        ),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 128}, r"in 1 of 6 layers.*layer, 3,.* 2 others"),
    ],
)
def test_sliding_windows_are_refused_with_the_reason(family, fields, says):
    with pytest.raises(UnsupportedModelError, match=rf"sliding-window.*{says}.*supported: llama"):
        anatomy(build(family, **fields))


def test_models_that_look_ahead_or_at_pictures_are_refused():
    with pytest.raises(UnsupportedModelError, match="see those after them"):
        anatomy(build("gemma3_text", use_bidirectional_attention=True))
    with pytest.raises(UnsupportedModelError, match="reads pictures too"):
        check_supported(AutoConfig.for_model("gemma3"))


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
    # what is offloaded computes on the first device
    wanted = [next((part for part in layer.split("+") if part in devices), devices[0]) for layer in layers]
    assert [str(device) for device in layer_devices(model)] == wanted
    assert str(input_device(model)) == devices[0]


def test_a_model_on_one_device_has_one_place():
    assert placement(shared()) == {"devices": ["cpu"], "layers": ["cpu"] * LAYERS, "offloaded": []}
