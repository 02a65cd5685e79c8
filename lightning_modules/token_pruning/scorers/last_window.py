"""Keep what the end of the prompt attends to."""

from typing import Any, Literal, Self

from torch import Tensor

from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.scorers.base import Context, Scorer


class LastWindow(Scorer):
    """Attention that the last tokens pay in the next layer, mean over these tokens, joined over heads.

    The queries and keys are computed from the projections, as in SnapKV (arXiv 2404.14469) and PyramidDrop
    (arXiv 2410.17247), so that any attention kernel may run the model. `window` 1 is FastV's score
    (arXiv 2403.06764).

    Args:
        window: Tokens at the end whose attention counts.
        heads: "max" keeps what any head looks for, "mean" what all of them do.
        only: Heads that count, by the layer that attends (the one after the pruning point); None, and layers that it
            does not name, take all. `calibrate` finds those that retrieve.

    Raises:
        ValueError: A window below 1, another way to join heads, or a layer with no head.
    """

    pool = 17  # with window 16 and "max" it needs least on planted facts of SmolLM2, see `calibrate`

    def __init__(
        self, window: int = 16, heads: Literal["max", "mean"] = "max", only: dict[int, list[int]] | None = None
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if heads not in ("max", "mean"):
            raise ValueError(f'heads must be "max" or "mean", got {heads!r}')
        if only is not None and not all(chosen and min(chosen) >= 0 for chosen in only.values()):
            raise ValueError(f"only: at least one head, from 0 up, for each layer named; got {only}")
        self.window, self.heads, self.only = window, heads, only

    @property
    def asking(self) -> int:  # type: ignore[override]
        """See `Scorer`: the window."""
        return self.window

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(), cls(window=1), cls(window=8, heads="mean"), cls(only={2: [1], 4: [0, 3]})]

    def check(self, config: Any, layers: list[int]) -> None:
        """See `Scorer.check`.

        Raises:
            ValueError: A layer or a head that the model does not have.
        """
        text = config.get_text_config()
        count, depth = text.num_attention_heads, text.num_hidden_layers
        for layer, chosen in (self.only or {}).items():
            if not 0 <= layer < depth:
                raise ValueError(f"only: there is no layer {layer}, the model has {depth}, counted from 0")
            if max(chosen) >= count:
                raise ValueError(f"only: layer {layer} has {count} heads, {chosen} are not all among them")

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        window, real_BN = min(self.window, hidden_BNH.shape[1]), context.real
        only = (self.only or {}).get(layer + 1)
        paid_BAWN = tail_attention(context.anatomy, layer + 1, hidden_BNH, window, context.rotary, real_BN, only)
        if real_BN is None:
            paid_BAN = paid_BAWN.mean(2)
        else:
            asking_BW = real_BN[:, -window:].to(paid_BAWN.device)  # padding in the window of a short row asks nothing
            total_BAN = (paid_BAWN * asking_BW[:, None, :, None]).sum(2)
            paid_BAN = total_BAN / asking_BW.sum(-1).clamp_min(1)[:, None, None]
        joined_BN = paid_BAN.amax(1) if self.heads == "max" else paid_BAN.mean(1)
        return joined_BN.to(hidden_BNH.device)
