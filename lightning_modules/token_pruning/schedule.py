"""After which layers tokens are dropped, how many stay, and which always stay."""

import copy
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor


class Schedule:
    """When to prune and how much to keep.

    A stage is one pruning point: tokens are dropped from the *output* of a layer, so that later layers never see them.
    All shares are of the prompt's original length n; padding is no part of a prompt. With the defaults this is the
    schedule of SDTP (arXiv 2504.04514): stages after layers 4, 7, 10, …, the s-th leaving keepˢ·n tokens.

    Always kept: the first `sinks` tokens, the last max(`min_tail`, `tail`·n), and `spans`. What is protected counts
    towards the budget, and raises it where it is larger.

    Args:
        layers: Layers after which to prune, counted from 0, ascending; None takes `first`, `step` and `count`.
        first: First layer, when `layers` is not given.
        step: Distance between layers.
        count: Number of stages; None takes as many as the model has room for.
        keep: A number r keeps rˢ·n tokens after stage s = 1, 2, …; a list gives every stage's share of n, never rising.
        tokens: Absolute budgets in place of `keep`: tokens that stay after every stage (a number), or after each (a
            list, never rising).
        sinks: Tokens at the start that always stay (attention sinks).
        tail: Share of the prompt at its end that always stays.
        min_tail: Least number of tokens at the end that stay.
        spans: Further positions [start, end) of the prompt that always stay, such as a question or a chat template.

    Raises:
        ValueError: A value outside its range, naming it.
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        first: int = 4,
        step: int = 3,
        count: int | None = None,
        keep: float | list[float] = 0.7,
        tokens: int | list[int] | None = None,
        sinks: int = 4,
        tail: float = 0.1,
        min_tail: int = 16,
        spans: list[tuple[int, int]] | None = None,
    ) -> None:
        self.layers, self.first, self.step, self.count = layers, first, step, count
        self.keep, self.tokens = keep, tokens
        self.sinks, self.tail, self.min_tail, self.spans = sinks, tail, min_tail, spans
        self._check_layers()
        self._check_budgets()
        if sinks < 0 or not 0 <= tail <= 1:
            raise ValueError(f"sinks must not be negative and tail must be within [0, 1], got {sinks} and {tail}")
        if min_tail < 1:
            raise ValueError(f"min_tail must be at least 1, got {min_tail}: the last token predicts the next one")
        for start, end in spans or ():
            if not 0 <= start < end:
                raise ValueError(f"spans: [{start}, {end}) is no stretch of a prompt; give 0 ≤ start < end")

    def _check_layers(self) -> None:
        if self.first < 0 or self.step < 1 or (self.count is not None and self.count < 1):
            raise ValueError(f"first ≥ 0, step ≥ 1 and count ≥ 1, got {self.first}, {self.step} and {self.count}")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise ValueError(f"layers must be distinct and ascending, got {self.layers}")

    def _check_budgets(self) -> None:
        shares = self.keep if isinstance(self.keep, list) else [self.keep]
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"keep must be within (0, 1], got {self.keep}")
        budgets = self.tokens if isinstance(self.tokens, list) else [1 if self.tokens is None else self.tokens]
        if not budgets or min(budgets) < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}: a stage would be left empty")
        for name, values in (("keep", shares), ("tokens", budgets)):
            if sorted(values, reverse=True) != list(values):
                raise ValueError(
                    f"{name} must not rise from stage to stage, got {values}: dropped tokens do not return"
                )

    def keeping(self, keep: float | list[float]) -> "Schedule":
        """The same schedule with other shares, in place of what it keeps now (absolute budgets too)."""
        other = copy.copy(self)
        other.keep, other.tokens = keep, None
        other._check_budgets()
        return other

    def resolve(self, model_layers: int) -> list[int]:
        """The layers after which to prune, in a model of this depth.

        Raises:
            ValueError: A layer outside the model, no room for a single stage, or lists of different lengths.
        """
        last = model_layers - 2  # after the last layer nothing is left to skip
        if self.layers is not None:
            chosen = list(self.layers)
        else:
            stop = last + 1 if self.count is None else self.first + self.step * self.count
            chosen = list(range(self.first, stop, self.step))
        fitting = [layer for layer in chosen if 0 <= layer <= last]
        if not chosen or fitting != chosen:
            raise ValueError(
                f"layers: {chosen or [self.first]} are not all within 0 … {last}; the model has {model_layers} layers, "
                f"and after the last nothing is left to skip. {len(fitting)} of these stages fit"
            )
        for name, values in (("keep", self.keep), ("tokens", self.tokens)):
            if isinstance(values, list) and len(values) != len(chosen):
                raise ValueError(f"{name} has {len(values)} values for {len(chosen)} stages (after layers {chosen})")
        return chosen

    def budget(self, stage: int, length: int) -> int:
        """Tokens that stay after a stage.

        Args:
            stage: Stage index from 0.
            length: Original length of the prompt in tokens, padding excluded.

        Returns:
            Between 1 and `length`, and not less than what is protected.
        """
        if self.tokens is not None:
            wanted = self.tokens[stage] if isinstance(self.tokens, list) else self.tokens
        else:
            share = self.keep[stage] if isinstance(self.keep, list) else self.keep ** (stage + 1)
            wanted = ceil(share * length - 1e-9)  # 0.7·10 is 7.000…1 in floating point
        return min(length, max(wanted, int(self.protected(length).sum())))

    def protected(self, length: int) -> Tensor:
        """Which tokens of a prompt always stay: bool `[length]`, on the CPU."""
        kept = torch.zeros(length, dtype=torch.bool)
        kept[: self.sinks] = True
        kept[max(0, length - max(self.min_tail, int(self.tail * length))) :] = True
        for start, end in self.spans or ():
            kept[start:end] = True
        return kept

    def lengths(self, length: int, model_layers: int) -> list[int]:
        """Tokens that each layer of the model works on, for a prompt of `length` tokens."""
        stages = self.resolve(model_layers)
        budgets = [length, *(self.budget(stage, length) for stage in range(len(stages)))]
        return [budgets[sum(after < layer for after in stages)] for layer in range(model_layers)]


PRESETS = {"keep09": 0.9, "keep08": 0.8, "keep07": 0.7}
"""The three configurations of SDTP and E-RECAP: the share that each stage keeps of what it gets."""


def preset(name: str, spans: Sequence[tuple[int, int]] = ()) -> Schedule:
    """One of the published configurations: after layers 4, 7, 10, …, first 4 and last 10 % (at least 16) protected.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"no schedule {name!r}; there are: {', '.join(PRESETS)}")
    return Schedule(keep=PRESETS[name], spans=list(spans) or None)
