"""Hiding tokens inside a model's own attention, softly enough to train through.

A token that is pruned after layer l disappears from the keys of all later layers. Here it stays, and log m is added to
its attention logits instead: with m = 0 that is the same for every token that is not pruned, with m between 0 and 1 it
is DynamicViT's policy softmax (arXiv 2106.02034), exp(a)·m over its sum, the diagonal exempt. Multiplying hidden states
by m instead does nothing: the next norm undoes it.

Shape legend: B sequences, N tokens, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.losses import normalise
from lightning_modules.token_pruning.masked_attention import attention_by_key_bias
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.selection import pooled, select

FLOOR = 1e-6
"""What a hard 0 is in training's forward pass. The gradient of log m at m = FLOOR is large, the attention it multiplies
is as small, and their product is the gradient of the policy softmax; at 0 it would be 0 · inf. Needs float32 or
bfloat16."""

LayerInput = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""From a layer and the hidden states [B, N, H] that enter it: those to use, and log m of the keys [B, N] or None."""


@contextmanager
def layer_inputs(model: PreTrainedModel, real_BN: Tensor, change: LayerInput) -> Iterator[None]:
    """Run ``change`` before every decoder layer of the forward passes in this block (whole sequences, no cache).

    Args:
        model: A decoder whose attention takes an additive mask: "sdpa" or "eager".
        real_BN: False on padding.
        change: What each layer gets instead.

    Raises:
        ValueError: an attention implementation that takes no mask.
    """
    parts, padded = anatomy(model), not bool(real_BN.all())

    def hook(index: int) -> Callable[..., Any]:
        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = dict(zip(parts.arguments, args, strict=False)) | kwargs
            hidden_BNH, log_mask_BN = change(index, call.pop("hidden_states"))
            dtype = hidden_BNH.dtype
            if log_mask_BN is None and padded:
                log_mask_BN = torch.zeros_like(real_BN, dtype=dtype)
            if log_mask_BN is not None:
                bias_BN = log_mask_BN.to(dtype).masked_fill(~real_BN.to(log_mask_BN.device), torch.finfo(dtype).min)
                log_mask_BN = bias_BN.to(hidden_BNH.device)[:, None, None, :]
            call["attention_mask"] = log_mask_BN
            return (hidden_BNH,), call

        return before

    with attention_by_key_bias(model):
        handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(parts.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Budget:
    """How many tokens of each row of a batch stay after each stage, and which always do.

    Attributes:
        stages: The layers after which tokens are dropped.
        tokens: By stage and row.
        protected: bool [B, N].
        pool: Width of the mean over neighbours, see ``selection.pooled``; None takes what suits the scorer.
    """

    stages: list[int]
    tokens: list[list[int]]
    protected: Tensor
    pool: int | None = None

    @classmethod
    def of(cls, schedule: Schedule, model_layers: int, prompt_BN: Tensor) -> "Budget":
        """The schedule, applied to the prompts of a batch (of any length and place in their rows)."""
        stages = schedule.resolve(model_layers)
        lengths = prompt_BN.sum(1).tolist()
        tokens = [[schedule.budget(stage, n) for n in lengths] for stage in range(len(stages))]
        protected = torch.zeros_like(prompt_BN)
        for row, n in enumerate(lengths):
            protected[row, prompt_BN[row]] = schedule.protected(n).to(prompt_BN.device)
        return cls(stages, tokens, protected, schedule.pool)


class Pruning:
    """Prunes by mask, stage after stage: give it to ``layer_inputs``.

    Each stage scores the hidden states that enter the next layer, keeps the best of what the stage before left (as the
    pruned prefill does), and multiplies its mask into that of the stages before.

    Args:
        score: From a stage's layer, hidden states [B, N, H] and which prompt tokens are still there, bool [B, N], to
            scores [B, N].
        prompt_BN: Tokens that may be dropped.
        budget: How many stay.
        temperature: None keeps or drops for good. A number brings the scores of each prompt to deviation 1, adds
            Gumbel noise of this size, drops by what comes out, and lets gradients through as if the mask were the
            sigmoid of the distance to the cut over the temperature.
        pool: Width of the mean over neighbours that suits the scorer, where the budget names none.
        asking: Last tokens of a prompt that count in no mean, see ``Scorer``.
        logits: From scores to what noise is added to, see ``Network``; None takes them as they are.

    Attributes:
        scores: What each stage chose by [B, N], without noise: means over neighbours, as ``logits``.
        alive: What each stage left, bool [B, N]; all tokens outside the prompts are.
    """

    def __init__(
        self,
        score: Callable[[int, Tensor, Tensor], Tensor],
        prompt_BN: Tensor,
        budget: Budget,
        temperature: float | None = None,
        pool: int = 1,
        asking: int = 0,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.score, self.prompt, self.budget, self.temperature = score, prompt_BN, budget, temperature
        self.pool, self.asking, self.logits = budget.pool or pool, asking, logits
        self.scores: dict[int, Tensor] = {}
        self.alive: dict[int, Tensor] = {}
        self._log_mask: Tensor | None = None

    def __call__(self, index: int, hidden_BNH: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``LayerInput``."""
        if index - 1 in self.budget.stages:
            self._prune(index - 1, hidden_BNH)
        return hidden_BNH, self._log_mask

    def _prune(self, layer: int, hidden_BNH: Tensor) -> None:
        stage = self.budget.stages.index(layer)
        before = self.alive[self.budget.stages[stage - 1]] if stage else torch.ones_like(self.prompt)
        # layers may be on several devices; masks are where the prompt is
        there = before & self.prompt
        free = there & ~self.budget.protected
        scores = self.score(layer, hidden_BNH, there).to(self.prompt.device)
        with torch.enable_grad():  # where the model only reads, its scorers still learn
            scores = self._pooled(scores, there, free)
            self.scores[layer] = scores = scores if self.logits is None else self.logits(scores)
        noisy = scores
        if self.temperature is not None:
            # noise is as large as what it disturbs: otherwise scores outgrow it, and nothing is tried any more
            noisy = normalise(scores, free) + self.temperature * _gumbel_difference(scores)
        kept, cut = keep_best(noisy.detach(), there, self.budget.protected, self.budget.tokens[stage])
        self.alive[layer] = kept | ~self.prompt
        if self.temperature is None:
            # a sharp head would see what only weighs FLOOR
            log_mask = torch.where(self.alive[layer], 0.0, -torch.inf)
        else:
            soft = torch.sigmoid((noisy - cut[:, None]) / self.temperature)
            mask = kept.float() + torch.where(free, soft - soft.detach(), 0.0)
            log_mask = torch.log(FLOOR + (1 - FLOOR) * torch.where(self.prompt, mask, 1.0))
        self._log_mask = log_mask if self._log_mask is None else self._log_mask + log_mask

    def _pooled(self, scores: Tensor, there: Tensor, free: Tensor) -> Tensor:
        """``selection.pooled`` over what is left: neighbours are those that the pruned prefill would have."""
        if self.pool == 1:
            return scores
        order = (~there).to(torch.uint8).argsort(dim=1, stable=True)  # what is there first, in its order
        from_end = there.flip(1).cumsum(1).flip(1)
        counted = free & (from_end > self.asking)
        means = pooled(scores.gather(1, order), self.pool, ~counted.gather(1, order))
        return torch.zeros_like(means).scatter(1, order, means)


def keep_best(scores: Tensor, candidates: Tensor, protected: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Keep what the pruned prefill keeps.

    Args:
        scores: [B, N].
        candidates: bool [B, N]; tokens that are still there.
        protected: bool [B, N]; tokens that always stay.
        tokens: How many stay in each row.

    Returns:
        What stays, bool [B, N], and the value that divides kept from dropped scores, [B].
    """
    index, chosen = select(scores, tokens, protected, candidates)
    chosen = torch.ones_like(index, dtype=torch.bool) if chosen is None else chosen
    kept = torch.zeros_like(candidates).scatter(1, index, chosen)
    ranked = scores.float().masked_fill(protected, torch.inf)
    last_in = ranked.masked_fill(~kept, torch.inf).amin(1)
    first_out = ranked.masked_fill(kept | ~candidates, -torch.inf).amax(1)
    cut = torch.where(first_out.isfinite() & last_in.isfinite(), (last_in + first_out) / 2, 0.0)
    return kept, cut


def _gumbel_difference(like: Tensor) -> Tensor:
    """Difference of two Gumbel variables, which is a logistic one: the noise of a two-way Gumbel softmax."""
    uniform = torch.rand_like(like).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform)
