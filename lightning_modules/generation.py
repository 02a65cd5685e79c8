"""Talking to an exported model: one streamed continuation, or a prompt loop."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lightning_modules.causal_lm import load_pretrained


def load(model_dir: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a Hugging Face folder or hub name, onto the GPU if there is one.

    Raises:
        FileNotFoundError: ``model_dir`` looks like a path but is not there.
    """
    looks_local = model_dir.startswith((".", "/", "~")) or model_dir.count("/") > 1
    if looks_local and not Path(model_dir).expanduser().is_dir():
        raise FileNotFoundError(f"no exported model at {model_dir}: run fit first, or give --model_dir")
    folder = str(Path(model_dir).expanduser()) if Path(model_dir).expanduser().is_dir() else model_dir
    model: Any = load_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> str:
    """Print a continuation of ``prompt`` token by token, and return it.

    Args:
        model: A ``PreTrainedModel`` for causal language modelling.
        tokenizer: Its tokenizer.
        prompt: What to continue; the model's context is shortened from the left if it is too long.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: Sample from the smallest set of tokens with this probability.
        max_new_tokens: Longest continuation, in tokens.
    """
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's context")
    ids = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt").input_ids[:, -room:].to(model.device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    )
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def repl(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """Read prompts until end of input or an empty line, and stream a continuation of each."""
    print("Type a beginning; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not prompt:
            return
        stream(model, tokenizer, prompt, **options)
