"""Which sentence follows."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

from lightning_modules.evaluation.local.base import CHOICE, LocalTask, shuffled

_CHOICES = 4
_CONTEXT = 3  # sentences before
_NEAR = 0.3  # longest relative difference of the lengths of a wrong and the right sentence


class NextSentence(LocalTask):
    """Which of four sentences of the same text follows a passage; the wrong ones are of a similar length.

    As HellaSwag asks (arXiv 1905.07830), with the text's own sentences in place of written ones.
    """

    chance = 1 / _CHOICES

    def candidates(self) -> Iterator[dict[str, Any]]:
        """See ``LocalTask.candidates``."""
        passages = list(self.passages(_CONTEXT))[:: _CONTEXT + 1]  # those that do not overlap
        sentences = sorted({passage[-1] for passage in passages}, key=lambda one: (len(one), one))
        lengths = [len(one) for one in sentences]
        for number, (*context, right) in enumerate(passages):
            key = f"{self.seed} {number}"
            near = range(
                bisect_left(lengths, (1 - _NEAR) * len(right)), bisect_right(lengths, (1 + _NEAR) * len(right))
            )
            drawn = random.Random(key).sample(near, min(_CHOICES, len(near)))
            wrong = [sentences[i] for i in drawn if sentences[i] != right][: _CHOICES - 1]
            if len(wrong) == _CHOICES - 1:
                yield {"context": " ".join(context), **shuffled(right, wrong, key)}

    def asks(self) -> dict[str, Any]:
        """See ``LocalTask.asks``."""
        return CHOICE
