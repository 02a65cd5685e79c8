"""Which tokens stay: the best-scored stretches up to a budget, protected ones first, their order unchanged.

Shape legend: B rows, N tokens before, K tokens after (of the row that keeps most).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled(scores_BN: Tensor, width: int, left_out_BN: Tensor) -> Tensor:
    """Mean of every token's score and its neighbours': what is kept is then stretches of text, not single tokens.

    Attention marks the surroundings of what is asked for rather than each of its tokens (SnapKV, arXiv 2404.14469,
    pools for the same reason). Sinks and asking tokens have scores of another size, which would smear over their
    neighbours: they are left out of every mean, and keep their own score.

    Args:
        scores_BN: Of tokens that are there, in their order.
        width: Tokens in the mean, odd; fewer at the ends and beside what is left out.
        left_out_BN: Tokens that count for none but themselves, bool `[B or 1, N]`; padding among them.

    Returns:
        float32 `[B, N]`.
    """
    scores = scores_BN.float()
    if width == 1:
        return scores
    counted = (~left_out_BN).float().expand_as(scores)
    means = F.avg_pool1d((scores * counted).masked_fill(left_out_BN, 0.0)[:, None], width, 1, width // 2)[:, 0]
    shares = F.avg_pool1d(counted[:, None], width, 1, width // 2)[:, 0]
    return torch.where(left_out_BN, scores, means / shares.clamp_min(1e-9))


def select(
    scores_BN: Tensor, budgets: Sequence[int], protected_BN: Tensor, real_BN: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose the tokens that stay. Sizes come from the host, so nothing waits for the device.

    Of equally scored tokens the earlier stays. NaN counts as the lowest score, and no score, infinite or not, outranks
    a protected token.

    Args:
        scores_BN: Higher means keep; padding may hold anything.
        budgets: Tokens that stay in each row; at least 1, at most its real tokens, at least its protected ones.
        protected_BN: Tokens that stay whatever their score; bool `[B or 1, N]`, no padding among them.
        real_BN: False on padding; None when there is none.

    Returns:
        Indices `[B, K]` of what stays, ascending in every row, and which of them are real tokens `[B, K]`: rows that
        keep fewer than K are filled up on the left. None when all are.
    """
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    ranked = scores_BN.float().nan_to_num(nan=lowest, posinf=highest, neginf=lowest)
    ranked = ranked.masked_fill(protected_BN, torch.inf)
    if real_BN is not None:
        ranked = ranked.masked_fill(~real_BN, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    widest = max(budgets)
    if min(budgets) == widest:
        return order[:, :widest].sort(dim=-1).values, None
    rows, width = order.shape
    place = torch.arange(width, device=order.device).expand(rows, width)
    allowed = torch.tensor(budgets).to(order.device, non_blocking=True)[:, None]
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, place < allowed)
    # a stable sort of kept puts what is dropped to the left of what stays, both in their order
    index = kept.to(torch.uint8).argsort(dim=-1, stable=True)[:, width - widest :]
    return index, kept.gather(1, index)


def take(rows_BNx: Tensor, index_BK: Tensor) -> Tensor:
    """Gather tokens: `[B or 1, N, …]` and `[B, K]` to `[B, K, …]`, on the device of the first."""
    index = index_BK.to(rows_BNx.device)
    if rows_BNx.shape[0] > 1:
        index = index + torch.arange(index.shape[0], device=index.device)[:, None] * rows_BNx.shape[1]
    # whole rows of a flat matrix: a copy of memory, several times faster than gather with an expanded index
    return rows_BNx.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index_BK.shape)


def put(rows_BKx: Tensor, index_BK: Tensor, real_BK: Tensor | None, length: int) -> Tensor:
    """Inverse of `take`: `[B, K, …]` at their places among `[B, length, …]`, zeros elsewhere."""
    index = index_BK.to(rows_BKx.device)
    index = index + torch.arange(index.shape[0], device=index.device)[:, None] * length
    if real_BK is not None:
        rows_BKx = rows_BKx * real_BK.to(rows_BKx.device)[..., None]
    out = rows_BKx.new_zeros(rows_BKx.shape[0] * length, *rows_BKx.shape[2:])
    return out.index_copy(0, index.flatten(), rows_BKx.flatten(0, 1)).unflatten(0, (-1, length))
