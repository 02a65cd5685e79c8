"""The largest budget whose perplexity stays under a limit."""

from collections.abc import Callable

_STEPS = 7  # bisections: the share is found to 1/128 of the range


def largest_share(ratio: Callable[[float], float | None], limit: float, most: float) -> float:
    """The largest share to remove whose perplexity is at most ``limit`` times the dense model's, by bisection.

    Args:
        ratio: Perplexity after removing this share of the decoder's parameters, over the dense model's; None where so
            little cannot be removed.
        limit: Largest ratio allowed.
        most: Largest share to try.

    Raises:
        ValueError: Even the smallest share tried is too much.
    """
    if (all_of_it := ratio(most)) is not None and all_of_it <= limit:
        return most
    low, high, found = 0.0, most, 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        lost = ratio(middle)
        if lost is None:
            low = middle
        elif lost <= limit:
            low = found = middle
        else:
            high = middle
    if not found:
        raise ValueError(
            f"no share down to {high:.2%} keeps the perplexity at or under {limit:g} × dense; raise the limit"
        )
    return found
