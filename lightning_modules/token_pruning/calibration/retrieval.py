"""How much of a prompt must stay for a planted answer to stay: by layer, head and window.

Some attention heads look up what is asked for (retrieval heads, Wu et al., arXiv 2404.15574), in few layers, and which
ones differs between models. A planted answer shows them: a head retrieves where the answer's surroundings rank high.

Shape legend: L layers, W windows, A attention heads, N tokens of the prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.token_pruning.anatomy import Rotary, anatomy
from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.passes import watched
from lightning_modules.token_pruning.selection import pooled


@torch.no_grad()
def tail_means(model: Any, ids_N: Tensor, windows: Sequence[int]) -> Tensor:
    """Attention that the last tokens of a prompt pay in every layer, mean over each of some windows.

    Args:
        model: A causal language model, not being pruned.
        ids_N: One prompt, int64, on the model's input device.
        windows: Numbers of last tokens.

    Returns:
        float16 ``[L, W, A, N]`` on the CPU.

    Raises:
        UnsupportedModelError: A layer is offloaded, or see ``anatomy``.
    """
    parts = anatomy(model)
    found: list[Tensor] = []

    def see(index: int, hidden_BNH: Tensor, rotary: Rotary | None) -> None:
        paid_AWN = tail_attention(parts, index, hidden_BNH, max(windows), rotary, None)[0]
        found.append(torch.stack([paid_AWN[:, -window:].mean(1) for window in windows]).half().cpu())

    with watched(model, see):
        model(input_ids=ids_N[None], use_cache=False, logits_to_keep=1)
    return torch.stack(found)


def share_needed(scores_xN: Tensor, evidence_N: Tensor, left_out_N: Tensor, pool: int) -> Tensor:
    """Share of the tokens that may be dropped which must stay for every token of the answer to stay.

    Args:
        scores_xN: Scores, any number of rows.
        evidence_N: The answer's tokens, bool.
        left_out_N: Tokens that stay whatever their score, bool; see ``selection.pooled``.
        pool: Width of the mean over neighbours.

    Returns:
        float32 of the rows' shape; 0 where the whole answer is protected.
    """
    scores = pooled(scores_xN.flatten(0, -2), pool, left_out_N[None]).masked_fill(left_out_N, -torch.inf)
    wanted = evidence_N & ~left_out_N
    if not wanted.any():
        return torch.zeros(scores_xN.shape[:-1])
    worst = scores[:, wanted].amin(-1, keepdim=True)
    share = (scores >= worst).sum(-1) / (~left_out_N).sum()
    return share.reshape(scores_xN.shape[:-1])
