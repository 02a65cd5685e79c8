"""Keep the start and the end of the cache."""

import torch
from torch import Tensor

from lightning_modules.token_pruning.peers.cache_selection import CacheSelection, Seen, check_keep


class StreamingLLM(CacheSelection):
    """Attention sinks and the latest entries, the same in every head.

    Source: StreamingLLM (arXiv 2309.17453), positions unchanged. Saves no prefill time.

    Args:
        keep: Share of the prompt's cache entries that stay.
        sinks: Tokens at the start that stay.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, keep: float = 0.5, sinks: int = 4) -> None:
        check_keep(keep)
        if sinks < 0:
            raise ValueError(f"sinks must not be negative, got {sinks}")
        self.keep, self.sinks = keep, sinks

    @property
    def first(self) -> int:
        """See `CacheSelection`: the sinks."""
        return self.sinks

    def scores(self, seen: Seen) -> Tensor:
        """See `CacheSelection.scores`."""
        groups, width = seen.keys_GND.shape[:2]
        return torch.arange(width, device=seen.keys_GND.device).float().expand(groups, -1)
