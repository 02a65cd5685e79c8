"""What `generate` may be asked for while prompts are pruned."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_CANDIDATES = (
    "candidate tokens would be read with the prompt, scored and dropped like it; leave it out, answers stay the same"
)
_REFUSED = {
    "prefill_chunk_size": "a prompt is scored as a whole, which chunks of it cannot be; leave it out",
    "prompt_lookup_num_tokens": _CANDIDATES,
    "assistant_model": _CANDIDATES,
    "assistant_early_exit": _CANDIDATES,
    "use_mtp": _CANDIDATES,
}
_CACHES = ("dynamic", "dynamic_full", "offloaded")


def refuse_options(model: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse a call of `generate` that a pruned prefill would make wrong.

    Args:
        model: The model; its generation configuration counts too.
        *args: Of the call.
        **kwargs: Of the call.

    Raises:
        ValueError: Naming the option: a prompt read in chunks, candidates (prompt lookup, assisted decoding), or a
            cache whose layers cannot grow unequally.
    """
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

    def option(name: str) -> Any:
        values = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
        return next((value for value in values if value is not None), None)

    for name, why in _REFUSED.items():
        if option(name):
            raise ValueError(f"token pruning: {name} cannot be used while prompts are pruned: {why}")
    cache = option("cache_implementation")
    if cache not in (None, *_CACHES):
        raise ValueError(
            f"token pruning: cache_implementation {cache!r} cannot be used while prompts are pruned: layers grow "
            f"unequally; leave it out, or take one of {', '.join(_CACHES)}"
        )


@contextmanager
def watched_generate(model: Any, generating: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within this context `model.generate` refuses what it cannot do, and runs inside `generating`."""
    generate = getattr(model, "generate", None)
    if generate is None:  # a decoder alone
        yield
        return
    before = vars(model).get("generate")

    @functools.wraps(generate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        refuse_options(model, *args, **kwargs)
        with generating():
            return generate(*args, **kwargs)

    model.generate = watched
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before
