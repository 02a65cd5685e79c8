"""Keep any cache entries: what a selection of entries must beat."""

import torch
from torch import Tensor

from lightning_modules.token_pruning.peers.cache_selection import CacheSelection, Seen, check_keep


class RandomCache(CacheSelection):
    """Entries drawn anew for each head, layer and prompt, and the last ones. Saves no prefill time.

    Args:
        keep: Share of the prompt's cache entries that stay.
        window: Tokens at the end that stay.
        seed: Of the sequence of draws.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, keep: float = 0.5, window: int = 32, seed: int = 0) -> None:
        check_keep(keep)
        if window < 0:
            raise ValueError(f"window must not be negative, got {window}")
        self.keep, self.window, self.seed = keep, window, seed
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def last(self) -> int:
        """See `CacheSelection`: the window."""
        return self.window

    def scores(self, seen: Seen) -> Tensor:
        """See `CacheSelection.scores`."""
        return torch.rand(seen.keys_GND.shape[:2], generator=self._generator).to(seen.keys_GND.device)
