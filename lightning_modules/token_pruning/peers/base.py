"""What a peer is: a published method that is measured beside `PromptPruner`, under the same budgets.

A peer offers what `PromptPruner` does, a context in which the model reads prompts in another way. Hooks on the decoder
do it, so that `generate`, forward calls and later turns on the same cache work as ever: for the caller, positions and
lengths stay those of the whole prompt, whatever the cache holds.

Shape legend: N tokens of the prompt, M of a later step, H hidden width.
"""

import weakref
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.variants import Variant
from lightning_modules.token_pruning.anatomy import Anatomy, anatomy, check_supported
from lightning_modules.token_pruning.cache import PrunedCache
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.serving import watched_generate

_read: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # decoders that have hooks now


class Peer(Variant):
    """A way of reading a prompt. One prompt at a time: batches are refused.

    Attributes:
        keep: Share that it keeps, of what it drops from.
    """

    keep: float

    def check(self, config: Any) -> None:
        """Refuse a model by its configuration, before its weights are read.

        Raises:
            UnsupportedModelError: See `check_supported`.
            ValueError: This peer cannot serve such a model.
        """
        check_supported(config)

    def digest(self) -> str:
        """Of another model's weights that it reads by, where there is one: equal for equal files; else empty."""
        return ""

    @abstractmethod
    def entries(self, length: int, layers: int) -> list[int]:
        """Cache entries (of each key-value head) that every layer is left with after a prompt of `length` tokens.

        Raises:
            ValueError: The prompt is too short for what always stays.
        """

    def kv_share(self, length: int, layers: int) -> float:
        """Cache entries of the prompt, as a share of the unpruned model's."""
        return sum(self.entries(length, layers)) / (length * layers)

    @abstractmethod
    def bound(self, cost: Cost, length: int) -> float:
        """Greatest possible speed-up of the prefill of one prompt, by operations; what selects them counts too.

        Args:
            cost: Of the model.
            length: Tokens of the prompt.
        """

    @abstractmethod
    def reading(self, model: Any, parts: Anatomy) -> "Reading":
        """What will read the prompts of one context."""

    @contextmanager
    def prefill(self, model: Any) -> Iterator["Reading"]:
        """Within this context the model reads prompts this peer's way; see `PromptPruner.prefill`.

        A prompt is what the model reads into an empty cache. Later steps and turns on the same cache stay whole.

        Yields:
            What happened to the latest prompt.

        Raises:
            UnsupportedModelError: See `anatomy`.
            ValueError: See `check`; from the model: a batch, padding, an empty prompt, a cache that was read before or
                that cannot be cut, `generate` without a cache, and see `serving.refuse_options`.
            RuntimeError: A peer has the model already.
        """
        self.check(model.config)
        parts = anatomy(model)
        if parts.decoder in _read:
            raise RuntimeError("a peer reads with this model already: contexts cannot be nested")
        run = self.reading(model, parts)
        with ExitStack() as stack:
            _read.add(parts.decoder)
            stack.callback(_read.discard, parts.decoder)
            for handle in run.hooks():
                stack.callback(handle.remove)
            stack.enter_context(watched_generate(model, run.generating))
            yield run


class Reading:
    """What a peer does in one context; subclasses say what it does to a prompt.

    Args:
        name: The peer's class, for messages.
        parts: The model.

    Attributes:
        length: Tokens of the latest prompt.
        renumbers: Whether later tokens are counted on from what is left of the prompt, not from its end.
    """

    renumbers = False

    def __init__(self, name: str, parts: Anatomy) -> None:
        self.name, self.parts, self.length = name, parts, 0
        self.reads_prompt = False
        self._busy = False  # the peer itself reads with the model
        self._cache: weakref.ref[Any] | None = None
        self._missing = 0  # tokens of the prompt that layer 0's cache has no entry of
        self._generating = self._has_read = False

    def hooks(self) -> list[Any]:
        """Register all hooks; returns their handles."""
        decoder = self.parts.decoder
        return [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end),
        ]

    def begin(self, call: dict[str, Any]) -> None:
        """A prompt comes: change the arguments that the decoder gets, in place."""

    def end(self, output: Any) -> None:
        """The decoder has read the prompt: change what it returns, in place."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within this context the peer itself may read with the model, as if there were no hooks."""
        self._busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._busy = False

    @contextmanager
    def generating(self) -> Iterator[None]:
        """One call of `generate`."""
        self._generating, self._has_read = True, False
        try:
            yield
        finally:
            self._generating = False

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._busy:
            return None
        call = dict(zip(self.parts.takes, args, strict=False)) | kwargs
        given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        assert given is not None
        width, cache = self._check(given, call.get("attention_mask")), call.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        self.reads_prompt = not past
        if past:
            self._go_on(call, cache, past, width, given.device)
        else:
            if self._generating and self._has_read:
                raise ValueError(
                    f"{self.name}: generate needs a cache, or the prompt is read anew at every step: set use_cache"
                )
            if cache is not None:
                PrunedCache.check(cache)
            self.length, self._cache, self._missing, self._has_read = width, None, 0, True
            self.begin(call)
        return (), call

    def _check(self, given: Tensor, mask: Any) -> int:
        rows, width = given.shape[:2]
        if rows > 1:
            raise ValueError(f"{self.name} reads one prompt at a time, not a batch of {rows}: beams and rows count")
        if not width:
            raise ValueError(f"{self.name}: an empty prompt, there is nothing to read")
        # a single new token is never padding, and asking would make the host wait at every step
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError(f"{self.name} makes attention masks itself: give attention_mask as [batch, tokens]")
        if mask is not None and width > 1 and not bool(mask.all()):
            raise ValueError(f"{self.name} reads prompts without padding: attention_mask must be 1 throughout")
        return width

    def _go_on(self, call: dict[str, Any], cache: Any, past: int, width: int, device: torch.device) -> None:
        """A later step: layers hold other numbers of tokens than its caller counts."""
        if self._cache is None or self._cache() is not cache:
            raise ValueError(
                f"{self.name} reads prompts into an empty cache, and this one holds {past} tokens that were read before"
            )
        places = call.get("position_ids")
        if places is None:
            places = torch.arange(past + self._missing, past + self._missing + width, device=device)[None]
        call["position_ids"] = places - self._missing if self.renumbers else places
        call["attention_mask"] = None  # nothing is padding: the mask follows from what the cache holds

    def _end(self, _: nn.Module, __: tuple, output: Any) -> None:
        if self._busy or not self.reads_prompt:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._cache, self._missing = weakref.ref(cache), self.length - cache.get_seq_length()
        self.end(output)
        self.reads_prompt = False
