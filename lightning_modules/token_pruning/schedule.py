"""After which layers tokens are dropped, how many stay, and which always stay."""

import copy
import inspect
from collections.abc import Sequence
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor


class Schedule:
    """When to prune and how much to keep.

    A stage is one pruning point: tokens are dropped from the *output* of a layer, so that later layers never see them.
    Padding is no part of a prompt. With the defaults stages lie where those of SDTP (arXiv 2504.04514) lie in a model
    of 28 layers, after layers 4, 7, 10, …, 25, at the same shares of any other model's depth; the s-th leaves keepˢ.

    Always kept: the first `sinks` tokens, the last max(`min_tail`, `tail`·n) of a prompt of n tokens, and `spans`.

    Args:
        layers: Layers after which to prune, counted from 0, ascending; None takes `first`, `step` and `count`.
        first: First layer, when `layers` is not given; None takes 4/28 of the model's depth.
        step: Distance between layers; None takes 3/28 of the model's depth.
        count: Number of stages; None takes as many as the model has room for, at most 8 where `step` is None too.
        keep: A number r keeps the share rˢ after stage s = 1, 2, …; a list gives every stage's share, never rising.
        tokens: Absolute budgets in place of `keep`: tokens that stay after every stage (a number), or after each (a
            list, never rising).
        of: What shares and tokens are counted of. "free": of the tokens that may be dropped; what is protected stays
            besides. "prompt": of the whole prompt, as published: what is protected counts towards the budget, and
            raises it where it is larger.
        sinks: Tokens at the start that always stay (attention sinks).
        tail: Share of the prompt at its end that always stays.
        min_tail: Least number of tokens at the end that stay.
        spans: Further positions [start, end) of the prompt that always stay, such as a question or a chat template.
        pool: Width of the mean over neighbouring tokens that scores are smoothed with before the best are chosen, odd;
            1 leaves them as they are, None takes what suits the scorer. See `selection.pooled`.

    Raises:
        ValueError: A value outside its range, naming it.
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        first: int | None = None,
        step: int | None = None,
        count: int | None = None,
        keep: float | list[float] = 0.7,
        tokens: int | list[int] | None = None,
        of: Literal["free", "prompt"] = "free",
        sinks: int = 4,
        tail: float = 0.1,
        min_tail: int = 32,
        spans: list[tuple[int, int]] | None = None,
        pool: int | None = None,
    ) -> None:
        self.layers, self.first, self.step, self.count = layers, first, step, count
        self.keep, self.tokens, self.of, self.pool = keep, tokens, of, pool
        self.sinks, self.tail, self.min_tail, self.spans = sinks, tail, min_tail, spans
        self._check_layers()
        self._check_budgets()
        if sinks < 0 or not 0 <= tail <= 1:
            raise ValueError(f"sinks must not be negative and tail must be within [0, 1], got {sinks} and {tail}")
        if min_tail < 1:
            raise ValueError(f"min_tail must be at least 1, got {min_tail}: the last token predicts the next one")
        if of not in ("free", "prompt"):
            raise ValueError(f'of must be "free" or "prompt", got {of!r}')
        if pool is not None and (pool < 1 or pool % 2 == 0):
            raise ValueError(f"pool must be odd and at least 1, got {pool}: as many neighbours on each side")
        for start, end in spans or ():
            if not 0 <= start < end:
                raise ValueError(f"spans: [{start}, {end}) is no stretch of a prompt; give 0 ≤ start < end")

    def _check_layers(self) -> None:
        given = [value for value in (self.first, self.step, self.count) if value is not None]
        if min(given, default=1) < 0 or 0 in (self.step, self.count):
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

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, as plain values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

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
        chosen = list(self.layers) if self.layers is not None else self._by_depth(model_layers)
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

    def _by_depth(self, model_layers: int) -> list[int]:
        """Stages at the shares of a model's depth that SDTP takes of 28 layers, unless told otherwise."""
        first = max(1, round(_FIRST * model_layers)) if self.first is None else self.first
        step = max(1, round(_STEP * model_layers)) if self.step is None else self.step
        if self.count is not None:
            return list(range(first, first + step * self.count, step))
        return list(range(first, model_layers - 1, step))[: _STAGES if self.step is None else None]

    def budget(self, stage: int, length: int) -> int:
        """Tokens that stay after a stage, protected ones included.

        Args:
            stage: Stage index from 0.
            length: Original length of the prompt in tokens, padding excluded.

        Returns:
            Between 1 and `length`, and not less than what is protected.
        """
        protected = int(self.protected(length).sum())
        of = length - protected if self.of == "free" else length
        if self.tokens is not None:
            wanted = self.tokens[stage] if isinstance(self.tokens, list) else self.tokens
        else:
            share = self.keep[stage] if isinstance(self.keep, list) else self.keep ** (stage + 1)
            wanted = ceil(share * of - 1e-9)  # 0.7·10 is 7.000…1 in floating point
        return protected + min(of, wanted) if self.of == "free" else min(length, max(wanted, protected))

    def starved(self, length: int, model_layers: int) -> list[int]:
        """The layers of those stages that keep nothing of such a prompt but what is protected."""
        stages, protected = self.resolve(model_layers), int(self.protected(length).sum())
        if protected >= length:
            return stages
        return [layer for stage, layer in enumerate(stages) if self.budget(stage, length) <= protected]

    def starvation(self, length: int, model_layers: int) -> str | None:
        """What is wrong with stages that keep nothing of such a prompt but what is protected; None without any."""
        starved = self.starved(length, model_layers)
        if not starved:
            return None
        return (
            f"of a prompt of {length} tokens the stages after layers {starved} keep only the "
            f"{int(self.protected(length).sum())} protected ones (sinks, tail, spans): raise the shares, shorten the "
            'tail, or set of="free"'
        )

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


_FIRST, _STEP, _STAGES = 4 / 28, 3 / 28, 8

_KEEP = {"09": 0.9, "08": 0.8, "07": 0.7}
PRESETS = {f"keep{name}": {"keep": keep} for name, keep in _KEEP.items()} | {
    f"sdtp{name}": {"layers": [4, 7, 10, 13, 16, 19, 22, 25], "keep": keep, "of": "prompt", "min_tail": 16}
    for name, keep in _KEEP.items()
}
"""The three configurations of SDTP and E-RECAP by the share that each stage keeps of what it gets: "keep…" at the same
shares of any model's depth, and "sdtp…" with the published layers and budgets of Qwen2-7B."""


def preset(name: str, spans: Sequence[tuple[int, int]] = ()) -> Schedule:
    """One of `PRESETS`: the first 4 and the last 10 % of the tokens are protected.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"no schedule {name!r}; there are: {', '.join(PRESETS)}")
    arguments: dict[str, Any] = PRESETS[name]
    return Schedule(**arguments, spans=list(spans) or None)
