"""Layer-wise reconstruction: what is left of a layer learns to give the outputs that the whole layer gave.

Cheap in memory (one layer with its optimizer state at a time) and close to full retraining; arXiv 2510.14444.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.block_sparsity.masks import mask_gradients, mask_weights
from lightning_modules.stream import LayerInputs


@dataclass(frozen=True)
class Reconstruction:
    """How long a layer learns.

    Args:
        steps: Steps of Adam, over the calibration batches in turn.
        learning_rate: Its learning rate.
    """

    steps: int
    learning_rate: float


def reconstruct(
    layer: nn.Module,
    matrices: Mapping[str, nn.Linear],
    keep: Mapping[str, Tensor],
    inputs: LayerInputs,
    targets: Sequence[Tensor],
    how: Reconstruction,
) -> tuple[float, float]:
    """Fit the kept weights of a decoder layer to the outputs that it had before.

    Args:
        layer: A decoder layer, on its device; its pruned weights are zero.
        matrices: Its linear layers by name.
        keep: Their masks.
        inputs: What the layers below it give now; padding does not count.
        targets: What the layer gave before, by batch: with all its weights, on the inputs of the unmasked model.
        how: How long.

    Returns:
        Relative squared error of the layer's output, before learning and after.
    """
    before = _error(layer, inputs, targets)
    _fit(layer, matrices, keep, inputs, targets, how)
    return before, _error(layer, inputs, targets)


def _fit(
    layer: nn.Module,
    matrices: Mapping[str, nn.Linear],
    keep: Mapping[str, Tensor],
    inputs: LayerInputs,
    targets: Sequence[Tensor],
    how: Reconstruction,
) -> None:
    """Adam on the layer's kept weights alone; gradients and flags are left as they were found."""
    required = {p: p.requires_grad for p in layer.parameters()}
    gradients = {p: p.grad for p in layer.parameters()}
    weights = [m.weight for m in matrices.values()]
    learning = set(weights)
    for p in required:
        p.requires_grad_(p in learning)
        p.grad = None
    optimizer = torch.optim.Adam(weights, how.learning_rate)
    with torch.enable_grad():
        for step in range(how.steps):
            batch = step % len(targets)
            found, wanted = inputs.through(layer, batch), targets[batch]
            loss = F.mse_loss(inputs.on_tokens(found).float(), inputs.on_tokens(wanted).float())
            loss.backward()
            mask_gradients(matrices, keep)
            optimizer.step()
            mask_weights(matrices, keep)
            optimizer.zero_grad()
    for p, needed in required.items():
        p.requires_grad_(needed)
        p.grad = gradients[p]


@torch.no_grad()
def _error(layer: nn.Module, inputs: LayerInputs, targets: Sequence[Tensor]) -> float:
    wrong, whole = 0.0, 0.0
    for batch, target in enumerate(targets):
        wanted = inputs.on_tokens(target, batch).float()
        wrong += float((inputs.on_tokens(inputs.through(layer, batch)).float() - wanted).pow(2).sum())
        whole += float(wanted.pow(2).sum())
    return wrong / max(whole, torch.finfo(torch.float32).tiny)
