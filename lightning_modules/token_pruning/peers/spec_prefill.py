"""A smaller model says what to read."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from lightning_modules.token_pruning.anatomy import Anatomy, anatomy
from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers.draft import Draft
from lightning_modules.token_pruning.peers.text_dropping import TextDropping
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.selection import pooled


class SpecPrefill(TextDropping):
    """Speculative prefill: a draft model reads the prompt, and the model reads what the end of it attended to.

    Attention of the draft's last tokens, mean over neighbours, greatest over all heads of all layers, mean over these
    tokens. Every token keeps its position.

    Source: SpecPrefill (arXiv 2502.02789), which takes tokens that the draft goes on with in place of the prompt's
    last. Sinks and the asking tokens are left out of the means, as everywhere here.

    Args:
        draft: Hugging Face folder, GGUF file or hub name of a smaller model with the same tokenizer.
        keep: Share of the tokens that may be dropped that the model reads.
        window: Tokens at the end whose attention counts.
        sinks: See `Schedule`.
        tail: See `Schedule`.
        min_tail: See `Schedule`.
        pool: Tokens in the mean over neighbours, odd.

    Raises:
        ValueError: A value outside its range; from `prefill`, a draft with another tokenizer.
    """

    renumbers = False

    def __init__(
        self,
        draft: str,
        keep: float = 0.5,
        window: int = 8,
        sinks: int = 4,
        tail: float = 0.1,
        min_tail: int = 32,
        pool: int = 13,
    ) -> None:
        if window < 1 or window > min_tail:
            raise ValueError(f"window must lie within 1 … min_tail {min_tail}, got {window}: the asking tokens stay")
        self.draft, self.keep, self.window = draft, keep, window
        self.sinks, self.tail, self.min_tail, self.pool = sinks, tail, min_tail, pool
        # pooled head by head, before heads are joined
        self.schedule = Schedule([0], keep=keep, sinks=sinks, tail=tail, min_tail=min_tail, pool=1)
        Schedule(pool=pool)
        self._draft = Draft(draft)

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls("runs/reader/model")]

    def digest(self) -> str:
        """See `Peer.digest`."""
        return self._draft.digest()

    def check(self, config: Any) -> None:
        """See `Peer.check`; the draft must be there."""
        super().check(config)
        self._draft.check()

    def choose(self, model: Any, parts: Anatomy, ids_1N: Tensor) -> Tensor:
        """See `TextDropping.choose`."""
        return self.best(self.scores(self._draft.beside(model), ids_1N))

    def scores(self, draft: Any, ids_1N: Tensor) -> Tensor:
        """What the draft's last tokens attend to, float32 `[N]`."""
        parts, length = anatomy(draft), ids_1N.shape[1]
        window = min(self.window, length)
        left_out = self.schedule.protected(length).to(ids_1N.device)[None]
        most_WN = torch.zeros(window, length, device=ids_1N.device)

        def at(layer: int) -> Callable[..., None]:
            def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
                call = dict(zip(parts.arguments, args, strict=False)) | kwargs
                rotary = call.get("position_embeddings")
                paid_AWN = tail_attention(parts, layer, call["hidden_states"], window, rotary, None)[0]
                smooth_AWN = pooled(paid_AWN.flatten(0, 1), self.pool, left_out).unflatten(0, paid_AWN.shape[:2])
                torch.maximum(most_WN, smooth_AWN.amax(0).to(most_WN.device), out=most_WN)

            return hook

        layers = enumerate(parts.layers)
        handles = [part.register_forward_pre_hook(at(layer), with_kwargs=True) for layer, part in layers]
        try:
            parts.decoder(input_ids=ids_1N, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return most_WN.mean(0)

    def choosing(self, cost: Cost, length: int) -> float:
        """See `TextDropping.choosing`: the draft's prefill without its head."""
        draft = self._draft.cost()
        return draft.prefill([length] * len(draft.linear)) - draft.head
