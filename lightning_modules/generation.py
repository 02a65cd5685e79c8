"""Talking to a model: one streamed continuation, or a prompt loop."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

Prompt = str | Sequence[dict[str, str]]
"""Text to continue, or the messages (``role``, ``content``) of a conversation to answer."""


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
) -> str:
    """Print a continuation of ``prompt`` token by token, and return it.

    What the model's own ``generation_config`` says of sampling and lengths does not count; these arguments do.

    Args:
        model: A ``PreTrainedModel`` for causal language modelling.
        tokenizer: Its tokenizer.
        prompt: What to continue, shortened from the left where it is too long; or messages, which the tokenizer's chat
            template renders.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: Sample from the smallest set of tokens with this probability.
        max_new_tokens: Longest continuation, in tokens.
        top_k: Sample from this many likeliest tokens; 0 from all.
        repetition_penalty: Scores of tokens that are there already are divided by this (arXiv 1909.05858); 1 is none.

    Raises:
        ValueError: See ``prompt_ids``; or no room for a prompt.
    """
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's context")
    ids = prompt_ids(tokenizer, prompt, room).to(model.get_input_embeddings().weight.device)
    with own_config(model, tokenizer):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            **sampling(temperature, top_p, top_k),
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def sampling(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    """Options of ``generate`` for drawing a token, or for taking the likeliest.

    Raises:
        ValueError: A value outside its range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "temperature and top_k must not be negative, and top_p must lie within (0, 1]; "
            f"got {temperature}, {top_k} and {top_p}"
        )
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, room: int) -> Tensor:
    """Token ids int64 ``[1, N]`` of a prompt, N at most ``room``.

    Raises:
        ValueError: There is nothing to begin with; messages without a chat template, or too long for the context.
    """
    if isinstance(prompt, str):
        # an empty text begins where texts begin
        ids = tokenizer(prompt, return_tensors="pt").input_ids.long()
        if not ids.shape[1] and tokenizer.bos_token_id is not None:
            ids = torch.tensor([[tokenizer.bos_token_id]])
        if not ids.shape[1]:
            raise ValueError("prompt: it is empty, and the tokenizer has no token that begins a text; give some text")
        return ids[:, -room:]
    if tokenizer.chat_template is None:
        raise ValueError("chat: the tokenizer has no chat template; leave --chat out, or give a chat model")
    ids = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    if ids.shape[1] > room:
        raise ValueError(
            f"prompt: the conversation has {ids.shape[1]} tokens, and only {room} leave room for max_new_tokens"
        )
    return ids


@contextmanager
def own_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within the block the model's own generation configuration says nothing but which tokens begin and end a text."""
    saved = model.generation_config
    end = saved.eos_token_id if saved.eos_token_id is not None else tokenizer.eos_token_id
    pad = saved.pad_token_id if saved.pad_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=saved.bos_token_id, eos_token_id=end, pad_token_id=pad, use_cache=True
    )
    try:
        yield
    finally:
        model.generation_config = saved


def repl(model: Any, tokenizer: PreTrainedTokenizerBase, chat: bool = False, **options: Any) -> None:
    """Read prompts until end of input or an empty line, and stream a continuation of each.

    Args:
        model: See ``stream``.
        tokenizer: See ``stream``.
        chat: Lines are one conversation; otherwise each is a text of its own.
        **options: See ``stream``.
    """
    said: list[dict[str, str]] = []
    print(f"Type {'a message' if chat else 'a beginning'}; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        said.append({"role": "user", "content": line})
        try:
            answer = stream(model, tokenizer, said if chat else line, **options)
        except ValueError as error:  # such as a conversation that has become too long
            said.pop()
            print(f"error: {error}", file=sys.stderr)
            continue
        said.append({"role": "assistant", "content": answer})
