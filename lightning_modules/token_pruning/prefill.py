"""Pruned prefill: a stock model reads a prompt, and tokens drop out on the way.

Forward pre-hooks do all of it. Between two layers a stage scores the hidden states, keeps the best and gathers them
with their rotary embeddings, so every token keeps its original position. Layers after a stage get a mask for the tokens
that are left, in the prefill and in every later step. Before the final norm the survivors return to their places, so
that `logits[:, -1]`, `labels=` and `logits_to_keep` mean what they always did; logits of dropped tokens mean nothing.
Attention kernels, cache layout and `generate` are untouched. What a cache holds before the prompt stays: a prefix that
was read without pruning in all layers, earlier pruned turns as their own stages left them.

Shape legend: B rows, N tokens of the padded prompt, K that are left, P cached before it, H hidden width.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from lightning_modules.token_pruning import pruning_file
from lightning_modules.token_pruning.anatomy import Anatomy, anatomy, check_supported
from lightning_modules.token_pruning.cache import Permit, PrunedCache, Stage
from lightning_modules.token_pruning.identity import config_differences, differences
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Context, Scorer
from lightning_modules.token_pruning.selection import pooled, put, select, take
from lightning_modules.token_pruning.serving import watched_generate

_pruned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # decoders that have hooks now


class PromptPruner:
    """A scorer and a schedule, ready to prune the prompts of any supported model.

    Args:
        scorer: Says which tokens to keep.
        schedule: Says after which layers and how many.
        later_turns: Prune later turns of a conversation too, each by the schedule; turns of no more tokens than it
            protects stay whole.
        base: Identity of the only model that they serve, see `identity_of`; None for any.
    """

    def __init__(
        self,
        scorer: Scorer,
        schedule: Schedule | None = None,
        later_turns: bool = False,
        base: dict[str, Any] | None = None,
    ) -> None:
        self.scorer, self.schedule, self.later_turns = scorer, schedule or Schedule(), later_turns
        self.base = base
        self._ready_for: tuple[Any, ...] = ()

    @classmethod
    def from_file(cls, folder: str | Path, later_turns: bool = False) -> "PromptPruner":
        """What `calibrate` found for a model; another model is refused.

        Args:
            folder: It holds `pruning.json`.
            later_turns: See `PromptPruner`.

        Raises:
            FileNotFoundError: It does not.
            ValueError: The file is damaged.
        """
        scorer, schedule, base = pruning_file.read(folder)
        return cls(scorer, schedule, later_turns, base)

    def check(self, config: Any) -> list[int]:
        """Refuse a model by its configuration, before its weights are read; returns the layers after which is pruned.

        Raises:
            UnsupportedModelError: See `check_supported`.
            ValueError: Stages that do not fit the model, or a scorer made for another one.
        """
        check_supported(config)
        self._refuse(config_differences(self.base, config) if self.base is not None else [])
        stages = self.schedule.resolve(config.num_hidden_layers)
        self.scorer.check(config, stages)
        return stages

    def _refuse(self, found: list[str]) -> None:
        if found:
            raise ValueError(
                f"this pruning was calibrated for another model: {'; '.join(found)}. Load the model that it was made "
                "for, or calibrate for this one (configs/token_pruning/calibrate.yaml)"
            )

    @contextmanager
    def prefill(self, model: Any) -> Iterator["Prefill"]:
        """Within this context the model prunes every prompt that it reads.

        `model.generate(…)` and plain forward calls work as ever, batches padded on the left included. A prompt is what
        the model reads, several tokens at once, into a cache that holds nothing pruned: an empty one, or one with a
        prefix, such as a system prompt, that was read without pruning and stays whole. Later turns on the same cache
        see the pruned prompt and are pruned only with `later_turns`. Without a cache, `generate` reads the prompt again
        at every step; the tokens that it kept at the first stay the same. Leaving the context leaves the model as it
        was.

        Args:
            model: A causal language model of a supported architecture.

        Yields:
            What happened to the latest prompt.

        Raises:
            UnsupportedModelError: See `anatomy`.
            ValueError: Stages that do not fit the model, or a scorer made for another one.
            RuntimeError: The model is being pruned already.
            And from `generate`, see `serving.refuse_options`.
        """
        stages, parts = self.check(model.config), anatomy(model)
        ready_for = (weakref.ref(model), model.device, model.dtype)
        if self._ready_for != ready_for:  # once, not for every prompt: a trained scorer checks and copies weights
            self._refuse(differences(self.base, model) if self.base is not None else [])
            self.scorer.prepare(model, stages)
            self._ready_for = ready_for
        if parts.decoder in _pruned:
            raise RuntimeError("this model is being pruned already: contexts cannot be nested")
        run = Prefill(parts, self.scorer, self.schedule, stages, self.later_turns)
        handles = [
            parts.decoder.register_forward_pre_hook(run.begin, with_kwargs=True),
            parts.norm.register_forward_pre_hook(run.end),
        ]
        # layers up to the first stage work on the whole prompt: they need no hook
        for index in range(stages[0] + 1, len(parts.layers)):
            handles.append(parts.layers[index].register_forward_pre_hook(run.at_layer(index), with_kwargs=True))
        _pruned.add(parts.decoder)
        try:
            with watched_generate(model, run.generating):
                yield run
        finally:
            _pruned.discard(parts.decoder)
            run.permit.open = False
            for handle in handles:
                handle.remove()


class Prefill:
    """What pruning does in one context, and what it did to the latest prompt.

    Attributes:
        input_ids: The latest prompt `[B, N]`, None when it was given as embeddings; what a cache held before it left
            out.
        rows: Its rows B.
        length: Its columns N.
        stages: What each pruning point left of it; empty when nothing was pruned.
    """

    def __init__(
        self, parts: Anatomy, scorer: Scorer, schedule: Schedule, layers: list[int], later_turns: bool = False
    ) -> None:
        self.parts, self.scorer, self.schedule, self.layers = parts, scorer, schedule, layers
        self.later_turns = later_turns
        self.permit = Permit()
        self.input_ids: Tensor | None = None
        self.rows = self.length = 0
        self.stages: list[Stage] = []
        self._mode: Literal["prompt", "later", "plain"] = "plain"
        self._budgets: list[list[int]] = []
        self._masks: dict[int, Any] = {}
        self._warned: set[str] = set()  # of what has been said once in this context
        self._protected = self._positions = torch.empty(0)
        self._real: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        # before the prompt: columns, and which of them are real
        self._past = 0
        self._prefix: Tensor | None = None
        # of this forward pass: the same as `stages`, unless the prompt is read again with what was said since
        self._passed: list[Stage] = []
        self._said = 0
        self._choices: list[tuple[Tensor, Tensor | None]] = []
        self._generating = self._read = False

    def kept(self) -> Tensor:
        """Tokens of the latest prompt that every stage left, bool `[stages, B, N]`; all but padding, if none pruned."""
        if not self.stages:
            real = torch.ones(self.rows, self.length, dtype=torch.bool) if self._real is None else self._real.cpu()
            return real.expand(len(self.layers), -1, -1)
        return torch.stack([stage.kept(self.length).cpu() for stage in self.stages])

    @contextmanager
    def generating(self) -> Iterator[None]:
        """One call of `generate`: what it reads without a cache after the prompt is the prompt, and its own answer."""
        self._generating, self._read = True, False
        try:
            yield
        finally:
            self._generating = False

    # ---- the start of a forward pass --------------------------------------------------------------------------

    def begin(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the decoder: is this a prompt, a later step, or nothing to do with pruning?"""
        call = dict(zip(self.parts.takes, args, strict=False)) | kwargs
        given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        cache, mask = call.get("past_key_values"), call.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError("token pruning makes the attention masks itself: give attention_mask as [batch, tokens]")
        assert given is not None
        if not given.shape[1]:
            raise ValueError("the prompt is empty: give one token at least")
        width, past = given.shape[1], 0 if cache is None else cache.get_seq_length()
        pruned = cache if isinstance(cache, PrunedCache) and cache.stretches else None
        if pruned is not None and pruned.after != self.layers:
            raise ValueError(
                f"this cache was pruned after layers {pruned.after}, and this schedule prunes after {self.layers}: go "
                "on with the schedule that it was begun with"
            )
        if pruned is not None:
            pruned.permit = self.permit  # of this context: layers append to the cache before anything is pruned
        self._masks, self._passed, self._said = {}, [], 0
        if self._generating and self._read and cache is None:
            self._mode, self._said = "prompt" if self.stages else "plain", width - self.length
            self._positions = torch.arange(width, device=given.device).expand(self.rows, width)
        elif width > 1 and (self.later_turns or pruned is None):
            if cache is None and mask is None:
                _refuse_packed(call.get("position_ids"))
            planned = self._plan(given, mask, past, warn=pruned is None)
            if planned and cache is not None:
                PrunedCache.check(cache)
            if planned or pruned is None:
                self.input_ids, self.stages, self._rotary = call.get("input_ids"), self._passed, None
                self.rows, self.length = given.shape[:2]
                self._choices, self._read = [], True
            self._mode = "prompt" if planned else "plain"
        else:
            self._mode = "plain"
        if pruned is not None and self._mode == "plain":
            self._mode = "later"
            self._grow(pruned, mask, given)

    def _plan(self, given: Tensor, mask: Tensor | None, past: int, warn: bool) -> bool:
        """Budgets and protected tokens of every row; whether there is anything to drop."""
        rows, width = given.shape[:2]
        lengths = [width]
        real = prefix = None
        if mask is not None:
            if mask.shape[1] != past + width:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns for {past} cached tokens and {width} new ones: give "
                    "it for all of them"
                )
            # the one time that the host waits for the device: sizes must be known to cut tensors
            # generate() without a mask takes every padding token for padding: within the text, it is text
            real, prefix = mask[:, past:].bool().cummax(-1).values, mask[:, :past].bool()
            ends_early, padding = (~mask[:, -1].bool()).sum(), (~prefix).sum()
            *lengths, not_on_the_left, padded = torch.cat([real.sum(-1), torch.stack([ends_early, padding])]).tolist()
            if not_on_the_left:
                raise ValueError("pad prompts on the left: generation goes on from the last column")
            real, prefix = real if min(lengths) < width else None, prefix if padded else None
        protected = torch.zeros(len(lengths), width, dtype=torch.bool)
        for row, length in enumerate(lengths):
            protected[row, width - length :] = self.schedule.protected(length)
        worth_it = self._worth_it(lengths, protected, warn)
        if worth_it or warn:
            self._real = real
        if not worth_it:
            return False
        for length, kept in sorted(set(zip(lengths, protected.sum(-1).tolist(), strict=True))):
            if kept < length:  # a row that is protected throughout has nothing to choose from anywhere
                self._say_starved(length)
        stages = range(len(self.layers))
        self._budgets = [[self.schedule.budget(stage, length) for length in lengths] for stage in stages]
        if len(lengths) < rows:
            self._budgets = [budgets * rows for budgets in self._budgets]
        self._protected = protected.to(given.device, non_blocking=True)
        self._positions = torch.arange(width, device=given.device).expand(rows, width)
        self._past, self._prefix = past, prefix
        return True

    def _worth_it(self, lengths: list[int], protected: Tensor, warn: bool) -> bool:
        if any(count < length for count, length in zip(protected.sum(-1).tolist(), lengths, strict=True)):
            return True
        if warn and "nothing pruned" not in self._warned:
            self._warned.add("nothing pruned")
            warnings.warn(
                f"nothing pruned: a prompt of {max(lengths)} tokens is no longer than what the schedule protects "
                "(sinks, tail, spans)",
                stacklevel=2,
            )
        return False

    def _say_starved(self, length: int) -> None:
        if "starved" in self._warned:
            return
        if said := self.schedule.starvation(length, len(self.parts.layers)):
            self._warned.add("starved")
            warnings.warn(said, stacklevel=2)

    def _grow(self, cache: PrunedCache, mask: Tensor | None, given: Tensor) -> None:
        """Note the entries that this step appends behind every pruning point."""
        real, new = None, given.shape[1]
        # a single new token is never padding, and asking would make the host wait at every step
        if mask is not None and new > 1 and not bool(mask[:, -new:].all()):
            real = mask[:, -new:].bool()
        for number in range(len(self.layers)):
            cache.grow(number, real, given.shape[:2])

    # ---- the layers -------------------------------------------------------------------------------------------

    def at_layer(self, index: int) -> Callable[..., Any]:
        """Pre-hook of one decoder layer."""
        names, prune = self.parts.arguments, index - 1 in self.layers
        number = sum(after < index for after in self.layers)

        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._mode == "plain":
                return None
            call = dict(zip(names, args, strict=False)) | kwargs
            hidden = call.pop("hidden_states")
            cache = call.get(self.parts.cache_argument)
            if self._mode == "later":
                # one query sees every key: where the kernel needed no mask for layer 0 it needs none here
                if hidden.shape[1] > 1 or call.get("attention_mask") is not None:
                    call["attention_mask"] = self._mask(hidden, cache, index, number)
                return (hidden,), call
            if prune:
                hidden = self._prune(index - 1, hidden, call, cache)
            if "position_embeddings" in call:
                call["position_embeddings"] = self._rotary
            # gaps between positions would be taken for the borders of packed sequences
            call["position_ids"] = None
            call["attention_mask"] = self._mask(hidden, cache, index, number)
            return (hidden,), call

        return hook

    def _prune(self, layer: int, hidden_BNH: Tensor, call: dict[str, Any], cache: Any) -> Tensor:
        """Drop tokens from the output of a layer."""
        if not self._passed:
            self._rotary = call.get("position_embeddings")
            if cache is not None:
                cache = PrunedCache.adopt(cache, self.layers, self._prefix)
                cache.begin(self._past, self.length, self.stages, self.permit)
        positions = self._positions.to(hidden_BNH.device)
        index, real = self._repeat(hidden_BNH) if self._said else self._choose(layer, hidden_BNH, positions)
        self._positions = positions.gather(1, index)
        if self._rotary is not None:
            cos, sin = self._rotary
            self._rotary = take(cos, index), take(sin, index)
        stage = Stage(layer, self._positions, real)
        if cache is None:
            self._passed.append(stage)
        else:
            cache.keep(stage)
        self._masks.clear()
        return take(hidden_BNH, index)

    def _choose(self, layer: int, hidden_BNH: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Places of the tokens that stay among those that are there, and which of them are real; see `select`."""
        device, budgets = hidden_BNH.device, self._budgets[len(self._passed)]
        real = None if self._real is None else self._real.to(device)
        protected = self._protected.to(device)
        context = Context(self.parts, positions, real, protected, tuple(budgets), self._rotary)
        with torch.no_grad():
            scores = self.scorer.score(hidden_BNH, layer, context)
        if scores.shape != hidden_BNH.shape[:2]:
            raise ValueError(
                f"{self.scorer!r} returned scores {tuple(scores.shape)} for tokens {tuple(hidden_BNH.shape[:2])}"
            )
        index, self._real = select(self._pooled(scores.to(device), protected, real), budgets, protected, real)
        self._protected = protected.expand(len(index), -1).gather(1, index)
        self._choices.append((index, self._real))
        return index, self._real

    def _pooled(self, scores: Tensor, protected: Tensor, real: Tensor | None) -> Tensor:
        left_out = protected.expand_as(scores) if real is None else protected | ~real
        if self.scorer.asking:
            left_out = left_out.clone()
            left_out[:, -self.scorer.asking :] = True
        return pooled(scores, self.schedule.pool or self.scorer.pool, left_out)

    def _repeat(self, hidden_BNH: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `_choose`: what was chosen when the prompt was read first, and all that was said since."""
        index, real = self._choices[len(self._passed)]
        rows, width = hidden_BNH.shape[:2]
        said = torch.arange(width - self._said, width, device=index.device).expand(rows, -1)
        if real is not None:
            real = torch.cat([real, torch.ones_like(said, dtype=torch.bool)], dim=1)
        return torch.cat([index, said], dim=1), real

    def _mask(self, hidden: Tensor, cache: Any, layer: int, number: int) -> Any:
        """The attention mask behind a pruning point (1 is the first), made once for all layers that share it."""
        if number not in self._masks:
            self._masks[number] = create_causal_mask(
                config=self.parts.decoder.config,
                inputs_embeds=hidden,
                attention_mask=self._passed[number - 1].real if cache is None else cache.masks[number - 1],
                past_key_values=cache,
                position_ids=None,
                layer_idx=layer,
            )
        return self._masks[number]

    # ---- the end ----------------------------------------------------------------------------------------------

    def end(self, _: nn.Module, args: tuple) -> Any:
        """Pre-hook of the final norm: survivors back to their places, zeros where tokens were dropped."""
        if self._mode != "prompt":
            return None
        hidden_BKH, last = args[0], self._passed[-1]
        return (put(hidden_BKH, last.index, last.real, self.length + self._said),)


def _refuse_packed(position_ids: Tensor | None) -> None:
    """Several texts in one row need masks that pruning does not make."""
    if position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError("position_ids jump: packed sequences cannot be pruned, give one text a row")
