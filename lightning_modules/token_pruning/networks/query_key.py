"""Learned queries and keys: what the end of the prompt asks for.

Shape legend: B sequences, N tokens, W asking tokens, H hidden size, A heads, D width of a head.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.networks.base import Network

_TINY = 1e-9


class QueryKey(Network):
    """Attention that the prompt's last tokens pay by projections learned for it, joined over heads.

    The attention of early layers does not know which token will be asked for, and a context token's own state cannot:
    the question comes after it. Trained towards `RetrievalAttention`, which later layers pay. No positions enter.

    Args:
        heads: Number of heads.
        head_dim: Width of each.
        window: Tokens at the end of the prompt that ask.
        join: "max" keeps what any head looks for, "mean" what all of them do.
        begin: Layer and head of the model, `[[7, 7], [14, 3]]`, whose projections the first of these heads start from;
            None starts from random ones. Not for models whose queries have biases or norms of their own.

    Raises:
        ValueError: A size below 1, another way to join heads, or more heads to begin from than there are.
    """

    pool = 17

    def __init__(
        self,
        heads: int = 4,
        head_dim: int = 64,
        window: int = 24,
        join: Literal["max", "mean"] = "max",
        begin: list[list[int]] | None = None,
    ) -> None:
        if min(heads, head_dim, window) < 1:
            raise ValueError(f"heads, head_dim and window must be at least 1, got {heads}, {head_dim} and {window}")
        if join not in ("max", "mean"):
            raise ValueError(f'join must be "max" or "mean", got {join!r}')
        if begin is not None and (len(begin) > heads or not all(len(pair) == 2 and min(pair) >= 0 for pair in begin)):
            raise ValueError(f"begin: at most {heads} pairs of layer and head, both from 0 up; got {begin}")
        self.heads, self.head_dim, self.window, self.join, self.begin = heads, head_dim, window, join, begin

    @property
    def asking(self) -> int:  # type: ignore[override]
        """See `Scorer`: the window."""
        return self.window

    def build(self, hidden_size: int) -> nn.Module:
        """See `Network.build`; scores are shares of attention, 1 being the average token's."""
        return _QueryKey(hidden_size, self)

    def start(self, scorer: nn.Module, model: Any) -> None:
        """See `Network.start`."""
        assert isinstance(scorer, _QueryKey)
        parts, dim = anatomy(model), self.head_dim
        for place, (layer, head) in enumerate(self.begin or ()):
            if layer >= len(parts.layers):
                raise ValueError(f"begin: the model has no layer {layer}, only {len(parts.layers)}")
            attention = parts.attention(layer)
            if not hasattr(attention, "q_proj"):
                raise ValueError(f"begin: a {parts.family} model has no query projections of their own; leave it out")
            scale = parts.input_scale(layer)
            if scale is None or hasattr(attention, "q_norm") or attention.q_proj.bias is not None:
                raise ValueError(
                    f"begin: queries and keys of a {parts.family} model are no mere projections of its normed hidden "
                    "states (norms of their own, none before, or biases); leave it out"
                )
            wide, narrow = (getattr(attention, name).weight for name in ("q_proj", "k_proj"))
            if attention.head_dim != dim or (head + 1) * dim > len(wide):
                raise ValueError(
                    f"begin: the model has {len(wide) // attention.head_dim} heads of {attention.head_dim} in layer "
                    f"{layer}, not head {head} of {dim}; set head_dim to theirs"
                )
            group = head * len(narrow) // len(wide)
            mine = slice(place * dim, (place + 1) * dim)
            with torch.no_grad():
                scorer.query.weight[mine] = (wide[head * dim : (head + 1) * dim] * scale).to(scorer.query.weight)
                scorer.key.weight[mine] = (narrow[group * dim : (group + 1) * dim] * scale).to(scorer.key.weight)

    def logits(self, scores_BN: Tensor) -> Tensor:
        """See `Network.logits`."""
        return scores_BN.clamp_min(_TINY).log()

    def flops(self, tokens: int, hidden_size: int) -> float:
        """See `Network.flops`."""
        width = self.heads * self.head_dim
        return 2.0 * width * ((tokens + self.window) * hidden_size + tokens * self.window)


class _QueryKey(nn.Module):
    def __init__(self, hidden_size: int, network: QueryKey) -> None:
        super().__init__()
        self.network = network
        width = network.heads * network.head_dim
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(hidden_size, width, bias=False)

    def forward(self, hidden_BNH: Tensor, there_BN: Tensor | None = None) -> Tensor:
        if there_BN is None:
            there_BN = torch.ones(hidden_BNH.shape[:2], dtype=torch.bool, device=hidden_BNH.device)
        there_BN = there_BN.to(hidden_BNH.device)
        places_BN = torch.arange(hidden_BNH.shape[1], device=hidden_BNH.device).masked_fill(~there_BN, -1)
        asking_BW = places_BN.topk(min(self.network.window, hidden_BNH.shape[1]), dim=1).values
        asks_BW, asking_BW = asking_BW >= 0, asking_BW.clamp_min(0)  # a short prompt has fewer
        # what asks is not judged: only tokens before the window are looked at
        first_B1 = asking_BW.masked_fill(~asks_BW, places_BN.shape[1]).amin(1, keepdim=True)
        judged_BN = (places_BN >= 0) & (places_BN < first_B1)
        normed_BNH = self.norm(hidden_BNH)
        asked_BWH = normed_BNH.gather(1, asking_BW[..., None].expand(-1, -1, normed_BNH.shape[-1]))
        heads = (self.network.heads, self.network.head_dim)
        query_BWAD, key_BNAD = self.query(asked_BWH).unflatten(-1, heads), self.key(normed_BNH).unflatten(-1, heads)
        logits_BAWN = torch.einsum("bwad,bnad->bawn", query_BWAD, key_BNAD).float() * heads[1] ** -0.5
        paid_BAWN = logits_BAWN.masked_fill(~judged_BN[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
        share_BW = asks_BW.float() / asks_BW.sum(1, keepdim=True).clamp_min(1)
        paid_BAN = torch.einsum("bawn,bw->ban", paid_BAWN, share_BW)
        paid_BN = paid_BAN.amax(1) if self.network.join == "max" else paid_BAN.mean(1)
        return paid_BN.masked_fill(~judged_BN, 0.0) * judged_BN.sum(1, keepdim=True)
