"""Attention that the last tokens of rows pay, from projections alone, so that any kernel may run the model.

Shape legend: B rows, N tokens, W last tokens, H hidden width, A query heads, G key-value heads, R query heads that
share one, D width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.token_pruning.anatomy import Anatomy, Rotary


def tail_attention(
    parts: Anatomy,
    layer: int,
    hidden_BNH: Tensor,
    window: int,
    rotary: Rotary | None,
    real_BN: Tensor | None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Probabilities that the last tokens give to all tokens under the causal mask, head by head.

    Args:
        parts: The model.
        layer: The layer that attends.
        hidden_BNH: Its input, before the input norm.
        window: Number W of last tokens, at most N.
        rotary: cos and sin ``[1 or B, N, R]`` of the tokens; None where positions are not rotary.
        real_BN: False on padding; None when there is none. What padding among the last tokens asks means nothing.
        heads: The query heads to look at, in this order; None takes all.

    Returns:
        float32 ``[B, A, W, N]``, A being the heads looked at, on the device of the layer.
    """
    last = None if rotary is None else (rotary[0][:, -window:], rotary[1][:, -window:])
    # scaled before the product, which half precision may not hold unscaled
    queries_BAWD = parts.queries(layer, hidden_BNH[:, -window:], last) * parts.attention(layer).scaling
    keys_BGND = parts.keys(layer, hidden_BNH, rotary)
    if heads is not None:
        shared = queries_BAWD.shape[1] // keys_BGND.shape[1]
        # slices: a list as an index would be copied to the device each time
        queries_BAWD = torch.cat([queries_BAWD[:, head : head + 1] for head in heads], 1)
        keys_BGND = torch.cat([keys_BGND[:, head // shared : head // shared + 1] for head in heads], 1)
    queries_BGRWD = queries_BAWD.unflatten(1, (keys_BGND.shape[1], -1))
    logits = (queries_BGRWD @ keys_BGND[:, :, None].transpose(-1, -2)).float()
    logits = parts.capped(logits)
    width = logits.shape[-1]
    hidden_keys = torch.ones(window, width, dtype=torch.bool, device=logits.device).triu(width - window + 1)
    if real_BN is not None:
        hidden_keys = hidden_keys | ~real_BN.to(logits.device)[:, None, None, None, :]
    return logits.masked_fill(hidden_keys, torch.finfo(torch.float32).min).softmax(-1).flatten(1, 2)


def mean_attention(
    parts: Anatomy,
    layer: int,
    hidden_BNH: Tensor,
    share_BN: Tensor,
    rotary: Rotary | None,
    real_BN: Tensor | None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Probabilities that some tokens give to all tokens, head by head, added up.

    Args:
        parts: See ``tail_attention``.
        layer: See ``tail_attention``.
        hidden_BNH: See ``tail_attention``.
        share_BN: Weight of each token that asks, 0 for the others.
        rotary: See ``tail_attention``.
        real_BN: See ``tail_attention``.
        heads: See ``tail_attention``.

    Returns:
        float32 ``[B, A, N]``, on the device of the layer.
    """
    window = share_BN.shape[1] - int((share_BN > 0).any(0).float().argmax())
    paid_BAWN = tail_attention(parts, layer, hidden_BNH, window, rotary, real_BN, heads)
    return torch.einsum("bw,bawn->ban", share_BN[:, -window:].to(paid_BAWN), paid_BAWN)
