"""Holding masks while weights change, and counting where they did not hold."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def mask_weights(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to zero.

    Args:
        matrices: Linear layers by name.
        keep: bool ``[R, C]`` of each, True where the weight stays.
    """
    for name, mask in keep.items():
        matrices[name].weight.masked_fill_(~mask, 0.0)


@torch.no_grad()
def mask_gradients(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> None:
    """Set the gradient of every pruned weight to zero, so that clipping and moments see only the rest."""
    for name, mask in keep.items():
        gradient = matrices[name].weight.grad
        if gradient is not None:
            gradient.masked_fill_(~mask, 0.0)


@torch.no_grad()
def violations(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> int:
    """Pruned weights that are not zero (NaN included); one wait for the device."""
    if not keep:
        return 0
    counts = [((matrices[name].weight != 0) & ~mask).sum() for name, mask in keep.items()]
    return int(torch.stack(counts).sum())


def check_held(matrices: Mapping[str, nn.Linear], keep: Mapping[str, Tensor], when: str) -> int:
    """Count violations.

    Raises:
        RuntimeError: There are some, with their number.
    """
    found = violations(matrices, keep)
    if found:
        raise RuntimeError(f"{found} pruned weights are not zero {when}")
    return found


def unstructured(scores_RC: Tensor, sparsity: float, keep_RC: Tensor) -> Tensor:
    """Mask that drops the lowest weights of every row, bool ``[R, C]``; of equals the first are dropped.

    The comparison inside a row is that of Wanda (arXiv 2306.11695, §3). Weights already pruned stay pruned.

    Args:
        scores_RC: Scores, not negative.
        sparsity: Share of every row that is zero afterwards.
        keep_RC: The mask so far.

    Raises:
        ValueError: A row has fewer weights left than ``sparsity`` allows.
    """
    drop = round(sparsity * scores_RC.shape[1])
    if (~keep_RC).sum(1).max() > drop:
        raise ValueError(f"a row has more zeros than sparsity {sparsity:g} asks for: pruned weights do not come back")
    dropped = scores_RC.masked_fill(~keep_RC, -1.0).argsort(dim=1, stable=True)[:, :drop]
    return torch.ones_like(keep_RC).scatter_(1, dropped, False)
