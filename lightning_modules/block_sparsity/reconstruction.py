"""Layer-wise reconstruction: what is left of a layer learns to give the outputs that the whole layer gave.

Cheap in memory (one layer with its optimizer state at a time) and close to full retraining; arXiv 2510.14444.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch
from lightning_modules.block_sparsity.masks import mask_gradients, mask_weights
from lightning_modules.stream import LayerInputs, decoder_layers, visiting


def reconstruct(
    model: nn.Module,
    matrices: Mapping[str, nn.Linear],
    keep: Mapping[str, Tensor],
    batches: Sequence[Batch],
    device: torch.device,
    steps: int,
    learning_rate: float,
) -> list[tuple[float, float]]:
    """Mask one decoder layer after the other and fit its kept weights to the outputs that it had before.

    A layer's target is its output with all its present weights on the inputs of the unmasked model; its inputs while
    learning are those that the already masked layers below really give.

    Args:
        model: The model; its pruned weights have not been set to zero yet.
        matrices: Linear layers by name.
        keep: Their new masks.
        batches: Calibration text, see ``batches.Batch``; padding does not count.
        device: Where to compute.
        steps: Steps of Adam per layer, over the batches in turn.
        learning_rate: Its learning rate.

    Returns:
        Relative squared error of each layer's output, after masking and after learning.
    """
    with torch.no_grad():
        whole, pruned = LayerInputs(model, batches, device), LayerInputs(model, batches, device)
    errors: list[tuple[float, float]] = []
    layers = decoder_layers(model)
    with stage("Reconstruction", len(layers), "layers") as done:
        for layer in layers.values():
            inside = set(layer.modules())
            mine = {name: m for name, m in matrices.items() if m in inside and name in keep}
            masks = {name: keep[name].to(device) for name in mine}
            with visiting(layer, device):
                with torch.no_grad():
                    whole.advance(layer)
                    mask_weights(mine, masks)
                    before = _error(layer, pruned, whole.hidden)
                _fit(layer, mine, masks, pruned, whole.hidden, steps, learning_rate)
                with torch.no_grad():
                    errors.append((before, _error(layer, pruned, whole.hidden)))
                    pruned.advance(layer)
            done(len(errors))
    return errors


def _fit(
    layer: nn.Module,
    matrices: Mapping[str, nn.Linear],
    keep: Mapping[str, Tensor],
    inputs: LayerInputs,
    targets: Sequence[Tensor],
    steps: int,
    learning_rate: float,
) -> None:
    """Adam on the layer's kept weights alone; gradients and flags are left as they were found."""
    required = {p: p.requires_grad for p in layer.parameters()}
    gradients = {p: p.grad for p in layer.parameters()}
    weights = [m.weight for m in matrices.values()]
    learning = set(weights)
    for p in required:
        p.requires_grad_(p in learning)
        p.grad = None
    optimizer = torch.optim.Adam(weights, learning_rate)
    with torch.enable_grad():
        for step in range(steps):
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


def _error(layer: nn.Module, inputs: LayerInputs, targets: Sequence[Tensor]) -> float:
    wrong, whole = 0.0, 0.0
    for batch, target in enumerate(targets):
        wanted = inputs.on_tokens(target, batch).float()
        wrong += float((inputs.on_tokens(inputs.through(layer, batch)).float() - wanted).pow(2).sum())
        whole += float(wanted.pow(2).sum())
    return wrong / max(whole, torch.finfo(torch.float32).tiny)
