"""Free answers: what a model says to a prompt, pruned or whole, and whether it is right."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from lightning_modules.generation import own_config
from lightning_modules.token_pruning.peers import Peer
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality.asked import Asked


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        text: Its answer.
        cached: Entries of the prompt that its key-value cache held, of all layers, as a share of the unpruned model's.
    """

    text: str
    cached: float


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    pruner: PromptPruner | Peer | None = None,
    max_new_tokens: int = 24,
) -> str:
    """What a model says to a prompt, its likeliest token at each step. See `answer_in_full`."""
    return answer_in_full(model, tokenizer, asked, pruner, max_new_tokens).text


@torch.no_grad()
def answer_in_full(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    pruner: PromptPruner | Peer | None = None,
    max_new_tokens: int = 24,
) -> Answer:
    """What a model says to a prompt, its likeliest token at each step, and what its cache held meanwhile.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        asked: The prompt.
        pruner: None reads the whole prompt.
        max_new_tokens: Longest answer, in tokens.
    """
    ids = asked.ids[None].to(model.get_input_embeddings().weight.device)
    cache = DynamicCache(config=model.config)
    pruning: AbstractContextManager[Any] = nullcontext() if pruner is None else pruner.prefill(model)
    with pruning, own_config(model, tokenizer):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    said = output[0, len(asked.ids) :]
    held = [layer.get_seq_length() - (len(said) - 1) for layer in cache.layers]  # the last token was not read
    text = str(tokenizer.decode(said, skip_special_tokens=True))
    return Answer(text, sum(held) / (len(held) * len(asked.ids)))


def is_right(asked: Asked, text: str) -> bool:
    """Whether a text comes to the answer before another of its kind; case, spaces and punctuation do not count."""
    said = f" {_words(text)} "
    places = [said.find(f" {_words(answer)} ") for answer in (asked.answer, *asked.also)]
    found = min((place for place in places if place >= 0), default=-1)
    return found >= 0 and not any(f" {_words(other)} " in said[: found + 1] for other in asked.others)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
