"""Drop what a language model could have guessed."""

import math
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from lightning_modules.token_pruning.anatomy import Anatomy
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers.draft import Draft
from lightning_modules.token_pruning.peers.text_dropping import TextDropping
from lightning_modules.token_pruning.samples import token_nll
from lightning_modules.token_pruning.schedule import Schedule


class LLMLingua(TextDropping):
    """Keeps the tokens of the greatest self-information −log p(token | tokens before), blind to the question.

    Source: Selective Context (arXiv 2310.06201) and the token level of LLMLingua (arXiv 2310.05736). What is left is
    read as a text of its own, positions anew. Without a smaller model it costs more than it saves.

    Args:
        keep: Share of the tokens that may be dropped that the model reads.
        draft: Hugging Face folder, GGUF file or hub name of a smaller model with the same tokenizer, which reads first;
            None takes the model itself.
        sinks: See `Schedule`.
        tail: See `Schedule`.
        min_tail: See `Schedule`.
        pool: See `Schedule`.

    Raises:
        ValueError: A value outside its range; from `prefill`, a draft with another tokenizer.
    """

    def __init__(
        self,
        keep: float = 0.5,
        draft: str | None = None,
        sinks: int = 4,
        tail: float = 0.1,
        min_tail: int = 32,
        pool: int = 1,
    ) -> None:
        self.keep, self.draft = keep, draft
        self.sinks, self.tail, self.min_tail, self.pool = sinks, tail, min_tail, pool
        self.schedule = Schedule([0], keep=keep, sinks=sinks, tail=tail, min_tail=min_tail, pool=pool)
        self._draft = None if draft is None else Draft(draft)

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(min_tail=8), cls(keep=0.3, tail=0.0, min_tail=8, pool=5)]

    def digest(self) -> str:
        """See `Peer.digest`."""
        return "" if self._draft is None else self._draft.digest()

    def check(self, config: Any) -> None:
        """See `Peer.check`; the draft must be there."""
        super().check(config)
        if self._draft is not None:
            self._draft.check()

    def choose(self, model: Any, parts: Anatomy, ids_1N: Tensor) -> Tensor:
        """See `TextDropping.choose`."""
        reader = model if self._draft is None else self._draft.beside(model)
        logits = reader(input_ids=ids_1N, use_cache=False).logits
        # before the first token there is nothing: a guess among the whole vocabulary
        nats_1N = F.pad(token_nll(logits, ids_1N.to(logits.device)), (1, 0), value=math.log(logits.shape[-1]))
        return self.best(nats_1N[0])

    def choosing(self, cost: Cost, length: int) -> float:
        """See `TextDropping.choosing`: a whole pass, and the head on every token."""
        reader = cost if self._draft is None else self._draft.cost()
        return reader.prefill([length] * len(reader.linear)) + reader.head * (length - 1)
