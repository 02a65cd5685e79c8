"""Writes a Llama, Mistral or Qwen2 as llama.cpp's converter does: reading GGUF files is tested without a download."""

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(path: Path, model: Any, tokenizer: Any, kind: Any = gguf.GGMLQuantizationType.F32) -> None:
    """Write weights and tokenizer.

    Args:
        path: Destination, ``….gguf``.
        model: A ``LlamaForCausalLM``, a ``MistralForCausalLM``, which is a Llama there too, or a ``Qwen2ForCausalLM``.
        tokenizer: A byte-level BPE.
        kind: Type of the matrices; vectors stay float32.
    """
    config = model.config
    out = gguf.GGUFWriter(path, "qwen2" if config.model_type == "qwen2" else "llama")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(head_dim)
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    _add_tokenizer(out, tokenizer, config.vocab_size)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, weight in model.state_dict().items():
        if name not in tied:
            matrix = _as_stored(name, weight.float(), config).numpy()
            out.add_tensor(
                _gguf_name(name),
                gguf.quants.quantize(matrix, kind) if weight.ndim == 2 else matrix,
                raw_dtype=kind if weight.ndim == 2 else None,
            )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def _as_stored(name: str, weight: Tensor, config: Any) -> Tensor:
    """llama.cpp rotates a Llama's neighbours, not halves: rows of queries and keys are in another order."""
    if config.model_type == "qwen2":
        return weight
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if part in name:
            return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape).contiguous()
    return weight


def _add_tokenizer(out: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [""] * size
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
    kinds = [gguf.TokenType.CONTROL if t in tokenizer.all_special_tokens else gguf.TokenType.NORMAL for t in tokens]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([token or f"<unused{i}>" for i, token in enumerate(tokens)])
    out.add_token_types(kinds)
    out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
