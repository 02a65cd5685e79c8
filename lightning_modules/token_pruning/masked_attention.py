"""Attention with a bias on keys, its queries in blocks: no tensor is as large as tokens × tokens.

A kernel that takes a mask takes all of it: at 8,192 tokens 128 MB in bfloat16 for every layer, and what autograd keeps
is as large for every head. Here the mask of a few hundred queries is made where it is needed, keys that none of them
may see are left out, and gradients compute a block again instead of keeping it.

Shape legend: B sequences, N tokens, A heads, D width of a head, Q queries of a block, K keys up to its last.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KERNELS = ("sdpa", "eager")
"""Attention implementations that take an additive mask."""

BLOCK = 512  # queries


@contextmanager
def attention_by_key_bias(model: PreTrainedModel) -> Iterator[None]:
    """In this block layers take a bias on keys ``[B, 1, 1, N]`` for ``attention_mask``, or None; the rest is causal.

    A token's own key is exempt, so that every row sees something. The numbers are those of the model's own kernel.

    Raises:
        ValueError: An attention implementation that takes no mask.
    """
    kind = model.config._attn_implementation
    if kind not in KERNELS:
        raise ValueError(f"attention {kind!r} takes no additive mask: load the base model with 'sdpa' or 'eager'")
    model.set_attn_implementation(_NAME.format(kind))
    try:
        yield
    finally:
        model.set_attn_implementation(kind)


def _attend(
    kind: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """See ``transformers.AttentionInterface``; returns ``[B, N, A, D]``."""
    if kind == "eager":
        kernel: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[kind]
    length = query.shape[2]
    if attention_mask is None and kind == "sdpa":
        return kernel(module, query, key, value, None, **options)[0], None
    bias_B11N = query.new_zeros(1, 1, 1, length) if attention_mask is None else attention_mask

    def block(query_BAQD: Tensor, key_BAKD: Tensor, value_BAKD: Tensor, bias_B11K: Tensor) -> Tensor:
        columns = torch.arange(key_BAKD.shape[2], device=bias_B11K.device)
        rows = columns[-query_BAQD.shape[2] :, None]
        mask_B1QK = bias_B11K.expand(-1, -1, len(rows), -1).masked_fill(columns == rows, 0.0)
        mask_B1QK = mask_B1QK.masked_fill(columns > rows, torch.finfo(bias_B11K.dtype).min)
        return kernel(module, query_BAQD, key_BAKD, value_BAKD, mask_B1QK, **options)[0]

    again = length > BLOCK and torch.is_grad_enabled() and (query.requires_grad or bias_B11N.requires_grad)
    found = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        parts = query[:, :, start:end], key[:, :, :end], value[:, :, :end], bias_B11N[..., :end]
        found.append(checkpoint(block, *parts, use_reentrant=False) if again else block(*parts))
    return torch.cat(found, dim=1), None


_NAME = "pare_key_bias_{}"
for _kind in KERNELS:
    AttentionInterface.register(_NAME.format(_kind), functools.partial(_attend, _kind))
