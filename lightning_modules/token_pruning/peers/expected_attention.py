"""Keep what future queries are expected to attend to, head by head."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.token_pruning.peers.cache_selection import CacheSelection, Seen, check_keep


class ExpectedAttention(CacheSelection):
    """Attention that a future query would pay if queries were normally distributed, times the length of the value.

    Mean μ and covariance Σ are those of the prompt's queries before rotation, rotated to the mean of the positions that
    come next. Up to a factor a query q ~ N(μ, Σ) then pays E exp(q·k/√d) = exp(μ·k/√d + k·Σk/2d) to a key k. The
    question is not looked at.

    Source: Expected Attention (arXiv 2510.00636), as kvpress has it. Saves no prefill time.

    Args:
        keep: Share of the prompt's cache entries that stay.
        future: Positions after the prompt that are thought of.
        sinks: Tokens at the start that stay, and whose queries do not count.
        covariance: Without it, queries are taken for their mean.
        epsilon: Added to the attention before it is multiplied with the length of the value.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        keep: float = 0.5,
        future: int = 512,
        sinks: int = 4,
        covariance: bool = True,
        epsilon: float = 0.0,
    ) -> None:
        check_keep(keep)
        if future < 1 or sinks < 0 or epsilon < 0:
            raise ValueError(
                f"future must be at least 1, sinks and epsilon not negative; got {future}, {sinks} and {epsilon}"
            )
        self.keep, self.future, self.sinks, self.covariance, self.epsilon = keep, future, sinks, covariance, epsilon

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(), cls(keep=0.3, sinks=1, covariance=False, epsilon=0.01)]

    @property
    def first(self) -> int:
        """See `CacheSelection`: the sinks."""
        return self.sinks

    def scores(self, seen: Seen) -> Tensor:
        """See `CacheSelection.scores`."""
        parts, layer, hidden_1NH = seen.parts, seen.layer, seen.hidden_1NH
        keys_GND, values_GND = (part[:, self.sinks :].float() for part in (seen.keys_GND, seen.values_GND))
        queries_1AND = parts.queries(layer, hidden_1NH[:, self.sinks :], None).float()
        places = torch.arange(seen.length, seen.length + self.future, device=hidden_1NH.device)[None]
        after = parts.rotary(hidden_1NH, places)
        # rotation is linear: the mean of rotated queries is what the mean of cos and sin makes of them
        turn = None if after is None else (after[0].float().mean(1, True), after[1].float().mean(1, True))
        mean_1AD = queries_1AND.mean(2)
        groups, scaling = len(keys_GND), float(parts.attention(layer).scaling)
        mean_GRD = parts.rotated(layer, mean_1AD[:, :, None], turn)[0, :, 0].unflatten(0, (groups, -1))
        logits_GRN = scaling * mean_GRD @ keys_GND.mT
        if self.covariance:
            apart = queries_1AND - mean_1AD[:, :, None]
            spread_1ADD = apart.mT @ apart / apart.shape[2]
            spread_1ADD = parts.rotated(layer, parts.rotated(layer, spread_1ADD, turn).mT, turn)
            spread_GRDD = spread_1ADD[0].unflatten(0, (groups, -1))
            logits_GRN += scaling**2 / 2 * ((keys_GND[:, None] @ spread_GRDD) * keys_GND[:, None]).sum(-1)
        scores_GN = (logits_GRN.softmax(-1).mean(1) + self.epsilon) * values_GND.norm(dim=-1)
        return F.pad(scores_GN, (self.sinks, 0))
