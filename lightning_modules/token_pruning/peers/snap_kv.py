"""Keep what the end of the prompt attends to, head by head."""

from typing import Self

import torch.nn.functional as F
from torch import Tensor

from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.peers.cache_selection import CacheSelection, Seen, check_keep


class SnapKV(CacheSelection):
    """Attention that the last tokens pay, mean over them, over neighbours and over the query heads of a group.

    Source: SnapKV (arXiv 2404.14469). As published, neighbours beyond the ends of the text count as zeros, and the
    asking tokens stay whatever they get. Saves no prefill time.

    Args:
        keep: Share of the prompt's cache entries that stay.
        window: Tokens at the end whose attention counts, and which stay.
        kernel: Neighbours in the mean, odd.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, keep: float = 0.5, window: int = 32, kernel: int = 5) -> None:
        check_keep(keep)
        if window < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"window must be at least 1 and kernel odd, got {window} and {kernel}")
        self.keep, self.window, self.kernel = keep, window, kernel

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(window=8), cls(keep=0.3, window=4, kernel=1)]

    @property
    def last(self) -> int:
        """See `CacheSelection`: the window."""
        return self.window

    def scores(self, seen: Seen) -> Tensor:
        """See `CacheSelection.scores`."""
        window = min(self.window, seen.hidden_1NH.shape[1])
        paid_AWN = tail_attention(seen.parts, seen.layer, seen.hidden_1NH, window, seen.rotary, None)[0]
        before = paid_AWN.shape[-1] - window
        pooled_AN = F.avg_pool1d(paid_AWN.mean(1)[:, :before], self.kernel, 1, self.kernel // 2)
        pooled_GN = pooled_AN.unflatten(0, (len(seen.keys_GND), -1)).mean(1)
        return F.pad(pooled_GN, (0, window))
