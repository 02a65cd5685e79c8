"""Text in which a passage comes again, so that reading it well means looking back."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from common.randomness import run_seed
from lightning_modules.data.loading import Batches, Blocks
from lightning_modules.data.sampler import FixedOrderSampler

_SHORTEST, _LONGEST = 8, 128  # tokens of a passage


class Repeats(Batches):
    """Blocks of text, some of which end with one of their passages, over and over.

    A passage of 8 to 128 tokens (fewer in short blocks) and the place from which it fills the rest of the block are
    random, and always the same for a block and a seed of the run. Every token that comes again can be told from the
    text before it, which gives the copying circuit of a model (induction heads, arXiv 2209.11895) a reason to form
    early; from plain text alone it took that paper's models billions of tokens.

    Args:
        blocks: The text.
        share: Share of the blocks that are changed, from 0 to 1.
    """

    def __init__(self, blocks: Blocks, share: float) -> None:
        self.blocks, self.share = blocks, share

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch as ``Blocks`` gives it."""
        batch = self.blocks.__getitems__(indices)
        ids, labels = batch["input_ids"].clone(), batch["labels"]
        for row, index in enumerate(indices):
            if index == FixedOrderSampler.PADDING:
                continue
            draw = np.random.default_rng((run_seed(), index))
            if draw.random() < self.share:
                start, place, passage = _places(draw, ids.shape[1])
                rest = ids.shape[1] - place
                ids[row, place:] = ids[row, start : start + passage].repeat(rest // passage + 1)[:rest]
                labels[row] = ids[row]
        return {"input_ids": ids, "labels": labels}


def _places(draw: np.random.Generator, width: int) -> tuple[int, int, int]:
    """Where the passage stands, from where on it comes again (once at least), and how long it is (log-uniform)."""
    longest = min(_LONGEST, width // 3)
    passage = int(np.exp(draw.uniform(np.log(min(_SHORTEST, longest)), np.log(longest + 1))))
    place = int(draw.integers(passage, width - passage + 1))
    start = int(draw.integers(place - passage + 1))
    return start, place, passage
