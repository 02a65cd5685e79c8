"""The largest budget whose perplexity stays under a limit."""

from collections.abc import Callable, Sequence


def largest_share(ratio: Callable[[float], float], limit: float, shares: Sequence[float]) -> float:
    """The largest share to remove whose perplexity is at most ``limit`` times the dense model's, by bisection.

    Args:
        ratio: Perplexity after removing this share of the decoder's parameters, over the dense model's.
        limit: Largest ratio allowed.
        shares: What can be removed, ascending; the largest is tried first.

    Raises:
        ValueError: Even the smallest share tried is too much.
    """
    low, high = -1, len(shares) - 1
    if ratio(shares[high]) <= limit:
        return shares[high]
    while high - low > 1:
        middle = (low + high) // 2
        if ratio(shares[middle]) <= limit:
            low = middle
        else:
            high = middle
    if low < 0:
        raise ValueError(
            f"no share down to {shares[0]:.2%} keeps the perplexity at or under {limit:g} × dense; raise the limit"
        )
    return shares[low]
