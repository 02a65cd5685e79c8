"""Where a Hugging Face decoder keeps what token pruning touches.

The only file of the feature that knows attribute names of transformers' model classes; `tests/…/test_anatomy.py` fails
when an upgrade moves one of them.

Shape legend: B rows, N tokens, H hidden width, A attention heads (keys: key-value heads), D head width, R rotary width.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]


class UnsupportedModelError(ValueError):
    """Token pruning cannot be exact on this model."""


@dataclass(frozen=True)
class _Family:
    layers: str
    norm: str
    attention: str
    input_norm: str | None
    """None where attention reads the hidden states as they are."""
    split: Callable[[Any, Tensor, bool], Tensor]
    """(attention module, normed hidden [B, N, H], keys?) → queries or keys [B, N, A, D], not yet rotated."""


def _separate(attention: Any, normed_BNH: Tensor, keys: bool) -> Tensor:
    """Llama and most others: one projection each; Qwen3 and Gemma 3 normalise every head."""
    heads_BNAD = (attention.k_proj if keys else attention.q_proj)(normed_BNH).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, "k_norm" if keys else "q_norm", None)
    return heads_BNAD if norm is None else norm(heads_BNAD)


def _normed_whole(attention: Any, normed_BNH: Tensor, keys: bool) -> Tensor:
    """OLMo2: one projection each, normalised over all heads together."""
    project, norm = (attention.k_proj, attention.k_norm) if keys else (attention.q_proj, attention.q_norm)
    heads_BNAD: Tensor = norm(project(normed_BNH)).unflatten(-1, (-1, attention.head_dim))
    return heads_BNAD


def _fused_grouped(attention: Any, normed_BNH: Tensor, keys: bool) -> Tensor:
    """Phi-3: queries of all heads, then keys, then values."""
    heads_BNAD = attention.qkv_proj(normed_BNH).unflatten(-1, (-1, attention.head_dim))
    groups = attention.num_key_value_heads
    queries_BNAD, keys_BNAD, _ = heads_BNAD.split([heads_BNAD.shape[2] - 2 * groups, groups, groups], dim=2)
    return keys_BNAD if keys else queries_BNAD


def _fused_by_head(attention: Any, normed_BNH: Tensor, keys: bool) -> Tensor:
    """GPT-NeoX: each head's query, key and value side by side."""
    return attention.query_key_value(normed_BNH).unflatten(-1, (-1, 3, attention.head_size))[..., int(keys), :]


def _fused_thirds(attention: Any, normed_BNH: Tensor, keys: bool) -> Tensor:
    """GPT-2: a third each."""
    return attention.c_attn(normed_BNH).chunk(3, dim=-1)[int(keys)].unflatten(-1, (-1, attention.head_dim))


_LLAMA = _Family("layers", "norm", "self_attn", "input_layernorm", _separate)
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": _Family("layers", "norm", "self_attn", None, _normed_whole),
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _Family("layers", "norm", "self_attn", "input_layernorm", _fused_grouped),
    "gpt_neox": _Family("layers", "final_layer_norm", "attention", "input_layernorm", _fused_by_head),
    "gpt2": _Family("h", "ln_f", "attn", "ln_1", _fused_thirds),
}
_OUTPUTS = ("o_proj", "dense", "c_proj")  # the projection of what attention found
SUPPORTED = tuple(_FAMILIES)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model; make it with `anatomy(model)`.

    Attributes:
        family: Its `model_type`.
        decoder: The module whose forward runs the layers; it takes `input_ids`, `attention_mask`, `past_key_values`.
        layers: The decoder layers, first to last.
        norm: The norm after the last layer.
        takes: Names of the decoder's forward arguments, in order, `self` left out.
        arguments: Names of a layer's forward arguments, in order, `self` left out.
        cache_argument: The one that carries the key-value cache.
    """

    family: str
    decoder: Any
    layers: Sequence[nn.Module]
    norm: nn.Module
    takes: tuple[str, ...]
    arguments: tuple[str, ...]
    cache_argument: str

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden states."""
        return int(self.decoder.config.hidden_size)

    @property
    def kernel(self) -> str:
        """The attention implementation that was asked for."""
        return str(self.decoder.config._attn_implementation)

    @property
    def longest(self) -> int | None:
        """Positions that the model has a vector for; None where they are rotary, which go on for ever."""
        return int(self.decoder.config.max_position_embeddings) if hasattr(self.decoder, "wpe") else None

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return getattr(self.layers[layer], _FAMILIES[self.family].attention)

    def input_scale(self, layer: int) -> Tensor | None:
        """What the RMS norm before a layer's attention multiplies channels by, `[H]`; None where there is none."""
        name = _FAMILIES[self.family].input_norm
        if name is None or getattr(getattr(self.layers[layer], name), "bias", None) is not None:
            return None
        weight: Tensor = getattr(self.layers[layer], name).weight
        return 1 + weight if self.family.startswith("gemma") else weight

    def query_width(self, layer: int) -> int:
        """Channels of a layer's queries, all heads together."""
        attention = self.attention(layer)
        output = next(getattr(attention, name) for name in _OUTPUTS if hasattr(attention, name))
        # a Linear holds its weight as [out, in], GPT-2's Conv1D as [in, out]
        rows, columns = output.weight.shape
        return int(rows if self.family == "gpt2" else columns)

    def active_weights(self, layer: int) -> float:
        """Weights of a layer's matrices that every token is multiplied with: of experts, those that it is sent to."""
        parameters = list(self.layers[layer].parameters())
        dense = sum(p.numel() for p in parameters if p.ndim == 2)
        experts = sum(p.numel() for p in parameters if p.ndim == 3)  # [experts, out, in]
        if not experts:
            return float(dense)
        config = self.decoder.config
        return dense + experts * config.num_experts_per_tok / config.num_local_experts

    def capped(self, logits: Tensor) -> Tensor:
        """Attention logits as the softmax gets them: Gemma 2 bends them off below a bound."""
        cap = self.decoder.config.attn_logit_softcapping if self.family == "gemma2" else None
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def queries(self, layer: int, hidden_BNH: Tensor, rotary: Rotary | None) -> Tensor:
        """What `layer` would ask with, were `hidden_BNH` its input: rotated queries `[B, A, N, D]`.

        Args:
            layer: Index of the layer.
            hidden_BNH: Its input, before the input norm.
            rotary: cos and sin `[1 or B, N, R]` of these tokens; None where positions are not rotary (GPT-2).
        """
        return self._heads(layer, hidden_BNH, rotary, keys=False)

    def keys(self, layer: int, hidden_BNH: Tensor, rotary: Rotary | None) -> Tensor:
        """What `layer` would be found by: rotated keys `[B, A, N, D]` of the key-value heads. See `queries`."""
        return self._heads(layer, hidden_BNH, rotary, keys=True)

    def _heads(self, layer: int, hidden_BNH: Tensor, rotary: Rotary | None, keys: bool) -> Tensor:
        family, module, attention = _FAMILIES[self.family], self.layers[layer], self.attention(layer)
        device = next(module.parameters()).device
        if device.type == "meta":
            raise UnsupportedModelError(f"layer {layer} is offloaded: scorers that need its attention cannot read it")
        normed_BNH = hidden_BNH.to(device)
        if family.input_norm is not None:
            normed_BNH = getattr(module, family.input_norm)(normed_BNH)
        return self.rotated(layer, family.split(attention, normed_BNH, keys).transpose(1, 2), rotary)

    def rotated(self, layer: int, heads_BAND: Tensor, rotary: Rotary | None) -> Tensor:
        """Queries or keys of a layer, turned to their positions; as they are where it knows none."""
        # some of SmolLM3's layers know no positions
        if rotary is None or not getattr(self.attention(layer), "use_rope", True):
            return heads_BAND
        cos, sin = (part.to(heads_BAND.device)[:, None] for part in rotary)
        return _rotate(heads_BAND, cos, sin)

    def rotary(self, hidden_BNH: Tensor, positions_BN: Tensor) -> Rotary | None:
        """cos and sin `[B, N, R]` of positions, as hidden states of this precision get them; None as in `queries`."""
        embedding = getattr(self.decoder, "rotary_emb", None)
        if embedding is None:
            return None
        # Gemma 3 has others for layers that see only a window
        kind = {"layer_type": "full_attention"} if self.family == "gemma3_text" else {}
        cos, sin = embedding(hidden_BNH, position_ids=positions_BN, **kind)
        return cos, sin


def _rotate(heads_BAND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first R channels, halves rotated against each other (as all rotary families here do)."""
    rotary = cos.shape[-1]
    turned, rest = heads_BAND[..., :rotary], heads_BAND[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def check_supported(config: Any) -> None:
    """Refuse a model by its configuration, before its weights are read.

    Raises:
        UnsupportedModelError: Its architecture is not one of `SUPPORTED`, layers see only a sliding window, or tokens
            see those after them.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    supported = f"supported: {', '.join(SUPPORTED)} with full attention"
    if kind == "gemma3":
        raise UnsupportedModelError(
            f"token pruning reads text, and this 'gemma3' model reads pictures too: take its text model; {supported}"
        )
    if kind not in _FAMILIES:
        raise UnsupportedModelError(f"token pruning does not know {kind!r} models; {supported}")
    sliding, layers = _sliding(config), config.num_hidden_layers
    if sliding:
        behind = layers - 1 - sliding[-1]
        raise UnsupportedModelError(
            f"this {kind!r} model has sliding-window attention in {len(sliding)} of {layers} layers: a window counts "
            "cache entries, and once tokens between two entries are dropped it would reach further back than the model "
            f"ever saw. Only behind the last such layer, {sliding[-1]}, could tokens be dropped, where there are "
            f"{behind} others; {supported}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"tokens of this {kind!r} model see those after them; {supported}")


def anatomy(model: Any) -> Anatomy:
    """Find the parts of a causal language model (or of its decoder alone).

    Raises:
        UnsupportedModelError: See `check_supported`.
    """
    config = getattr(model, "config", model)
    check_supported(config)
    kind = config.model_type
    family = _FAMILIES[kind]
    decoder = model.get_decoder()
    layers = getattr(decoder, family.layers)
    takes, arguments = (tuple(inspect.signature(type(part).forward).parameters)[1:] for part in (decoder, layers[0]))
    cache = "past_key_values" if "past_key_values" in arguments else "layer_past"
    return Anatomy(kind, decoder, layers, getattr(decoder, family.norm), takes, arguments, cache)


def _sliding(config: Any) -> list[int]:
    """Layers that see only a window, ascending."""
    types = getattr(config, "layer_types", None)
    if types is not None:  # Qwen keeps a window's size even where no layer uses it
        return [layer for layer, kind in enumerate(types) if kind != "full_attention"]
    return [] if getattr(config, "sliding_window", None) is None else list(range(config.num_hidden_layers))


def placement(model: Any) -> dict[str, list[str]]:
    """Where `device_map` put a model.

    Returns:
        `devices`: all devices that compute, in order of first use; `layers`: where each decoder layer's weights are,
        "cuda:0+disk" where they are in two places; `offloaded`: parts that live on the CPU or disk while others are on
        an accelerator, so that every forward pass copies them over.
    """
    places = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}
    named = {part: f"cuda:{place}" if isinstance(place, int) else str(place) for part, place in places.items()}
    compute = [place for place in dict.fromkeys(named.values()) if place not in ("cpu", "disk")]
    offloaded = [part or "model" for part, place in named.items() if place == "disk" or (compute and place == "cpu")]
    names = {id(module): name for name, module in model.named_modules()}
    layers = [_place(names[id(layer)], named) for layer in anatomy(model).layers]
    return {"devices": compute or ["cpu"], "layers": layers, "offloaded": offloaded}


def _place(name: str, places: Mapping[str, str]) -> str:
    """Where a module is: as the narrowest part around it, and as the parts inside it."""
    around = [part for part in places if part in ("", name) or name.startswith(f"{part}.")]
    parts = [max(around, key=len)] if around else []
    parts += [part for part in places if part.startswith(f"{name}.")]
    return "+".join(dict.fromkeys(places[part] for part in parts))


def layer_devices(model: Any) -> list[torch.device]:
    """Where each decoder layer computes; where it is offloaded, the device that its weights are copied to."""
    places = placement(model)
    devices = places["devices"]
    parts = [place.split("+") for place in places["layers"]]
    return [torch.device(next((part for part in places if part in devices), devices[0])) for places in parts]


def input_device(model: Any) -> torch.device:
    """Where a model reads its input; `model.device` would say "meta" where the first weights are on disk."""
    return torch.device(placement(model)["devices"][0])
