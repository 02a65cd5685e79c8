"""How much a model's loss minds errors in what its matrices give.

Shape legend: R rows (outputs) of a matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch, labels
from lightning_modules.perplexity import next_token_nll
from lightning_modules.stream import backward


def output_sensitivity(
    model: Any, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
) -> dict[str, Tensor]:
    """Σ over the tokens of (∂loss/∂y)² for every output y of every matrix, float32 ``[R]`` by name, on the CPU.

    The diagonal of the empirical Fisher matrix of the outputs: an error e of y adds about ½·Fisher·e² to the loss. One
    backward pass, a layer at a time (``stream.backward``), without gradients of weights.

    Args:
        model: A Hugging Face causal language model; its layers visit the device one after the other.
        matrices: Linear layers by name.
        batches: Calibration text.
        device: Where to compute.

    Raises:
        ValueError: There is no calibration text, or a gradient is not finite.
    """
    if not batches:
        raise ValueError("calibration needs at least one batch of text")
    training = model.training
    model.eval()
    found = {name: torch.zeros(m.out_features, device=device) for name, m in matrices.items()}
    required = {p: p.requires_grad for p in model.parameters()}

    def watch(name: str) -> Callable[..., None]:
        def forward(_: nn.Module, args: Any, y: Tensor) -> None:
            if y.requires_grad:  # in the pass that gradients go back through
                y.register_hook(lambda gradient: add(name, gradient))

        return forward

    def add(name: str, gradient: Tensor) -> None:
        found[name] += gradient.float().square().flatten(0, -2).sum(0)

    for p in required:
        p.requires_grad_(False)
    hooks = [m.register_forward_hook(watch(name)) for name, m in matrices.items()]
    try:
        with stage("Sensitivity of the outputs", len(batches), "batches") as done:
            for number, batch in enumerate(batches, 1):
                backward(model, batch, device, partial(_nll, labels(batch).to(device)))
                done(number)
    finally:
        for hook in hooks:
            hook.remove()
        for p, needed in required.items():
            p.requires_grad_(needed)
        model.train(training)
    if not all(total.isfinite().all() for total in found.values()):
        raise ValueError("the gradients of the calibration text have NaN or Inf")
    return {name: total.cpu() for name, total in found.items()}


def _nll(targets: Tensor, scores: Tensor) -> Tensor:
    return next_token_nll(scores, targets)[0]
