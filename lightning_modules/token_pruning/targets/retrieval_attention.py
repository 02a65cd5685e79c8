"""Attention that the prompt's own end pays in layers that look things up."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.anatomy import Rotary, anatomy
from lightning_modules.token_pruning.attention import mean_attention
from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.selection import pooled
from lightning_modules.token_pruning.targets.base import Reading, Target


class RetrievalAttention(Target):
    """Attention that the last tokens of a prompt pay in the heads that retrieve, mean over neighbours.

    It needs no response and runs no layer above the last of these: what `LastWindow` would see there, for scorers of
    earlier layers to learn. The same at every pruning layer.

    Args:
        only: Heads that count, by layer, as `calibrate` finds them for `LastWindow`.
        window: Tokens at the end of the prompt that ask.
        heads: "max" is what any head looks for, "mean" what all of them do.
        pool: Width of the mean over neighbours, odd; see `selection.pooled`.
        sinks: First tokens of the prompt, which count in no mean.

    Raises:
        ValueError: No layer, a layer with no head, a window below 1, an even pool, or another way to join heads.
    """

    def __init__(
        self,
        only: dict[int, list[int]],
        window: int = 24,
        heads: Literal["max", "mean"] = "max",
        pool: int = 17,
        sinks: int = 4,
    ) -> None:
        if not only or not all(chosen and min(chosen) >= 0 and layer >= 0 for layer, chosen in only.items()):
            raise ValueError(f"only: at least one layer, and one head for each, from 0 up; got {only}")
        if window < 1 or sinks < 0 or pool < 1 or pool % 2 == 0:
            raise ValueError(f"window ≥ 1, sinks ≥ 0 and an odd pool, got {window}, {sinks} and {pool}")
        if heads not in ("max", "mean"):
            raise ValueError(f'heads must be "max" or "mean", got {heads!r}')
        self.only, self.window, self.heads, self.pool, self.sinks = only, window, heads, pool, sinks

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls({3: [1], 4: [0, 2]}, window=4, pool=3)]

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``.

        Raises:
            ValueError: A layer or head that the model does not have.
        """
        parts, prompt_BN = anatomy(model), samples.prompt
        count = model.config.get_text_config().num_attention_heads
        for layer, chosen in self.only.items():
            if layer >= len(parts.layers) or max(chosen) >= count:
                has = f"{len(parts.layers)} layers of {count} heads"
                raise ValueError(f"only: heads {chosen} of layer {layer}, but the model has {has}")
        asking_BN = prompt_BN & (prompt_BN.flip(1).cumsum(1).flip(1) <= self.window)
        share_BN = asking_BN.float() / asking_BN.sum(1, keepdim=True).clamp_min(1)
        found: list[Tensor] = []

        def see(index: int, hidden_BNH: Tensor, rotary: Rotary | None) -> None:
            if index in self.only:
                heads = self.only[index]
                paid_BAN = mean_attention(parts, index, hidden_BNH, share_BN, rotary, samples.real, heads)
                found.append(paid_BAN.to(prompt_BN.device))

        def values(_: Tensor | None) -> dict[int, Tensor]:
            paid_BAN = torch.cat(found, dim=1)
            joined_BN = paid_BAN.amax(1) if self.heads == "max" else paid_BAN.mean(1)
            left_out_BN = ~prompt_BN | asking_BN | (prompt_BN.cumsum(1) <= self.sinks)
            return dict.fromkeys(layers, pooled(joined_BN, self.pool, left_out_BN))

        return Reading(values, last=max(self.only), see=see)
