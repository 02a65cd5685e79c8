"""What a part costs once the others are refitted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import tokens_of
from lightning_modules.stream import LayerInputs
from lightning_modules.structured_pruning.evaluation import backward
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores, gradients_of
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.memory import DOUBLE, SINGLE, Workload

_STEPS = 64  # a layer's channels go in about so many steps


class Refitted(Importance):
    """Error that removing a part leaves after least squares: tr(W_p ([(Σ x xᵀ + λ I)⁻¹]_pp)⁻¹ W_pᵀ), x the inputs.

    It is the optimal brain surgeon's, for whole parts (SlimGPT, arXiv 2412.18110; ZipLM, arXiv 2302.04089). Parts go
    one after the other, the cheapest first, and inverse and weights follow as if the rest had been refitted: of two
    parts that say the same, one is cheap and one is dear. A part's score is the dearest step until it is gone. Channels
    go in 64 steps, those of a step chosen together.

    With ``by_loss`` errors count by what the loss makes of them: W becomes G^½ W, with G = Σ g gᵀ and g the gradient of
    the loss with respect to the matrix's output (as in LLM Surgeon, arXiv 2312.17244). That takes a backward pass, and
    a matrix of hidden size by hidden size for every ``o_proj`` and ``down_proj``; Σ x xᵀ is there for one layer only.

    Args:
        damping: λ, as a share of the mean diagonal of Σ x xᵀ.
        by_loss: Weigh errors by the loss; otherwise all outputs count alike.

    Raises:
        ValueError: A damping that is not positive.
    """

    shows_progress = True

    def __init__(self, damping: float = 1e-2, by_loss: bool = True) -> None:
        if damping <= 0:
            raise ValueError(f"importance: damping must be positive, got {damping}")
        self.damping, self.by_loss = damping, by_loss

    @classmethod
    def examples(cls) -> list["Refitted"]:
        """See ``Variant.examples``."""
        return [cls(), cls(by_loss=False)]

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        layers = decoder_layers(model)
        gradients = _gradient_products(model, batches) if self.by_loss else {}
        found = []
        with torch.no_grad(), stage("Scoring by refitted", len(layers), "layers") as done:
            inputs = LayerInputs(model, batches, model.device)
            for number, layer in enumerate(layers, 1):
                matrices = (layer.self_attn.o_proj, layer.mlp.down_proj)
                products = _input_products(layer, matrices, inputs)
                scores = []
                for matrix, xx, parts in zip(matrices, products, (shape_of(layer).groups, None), strict=True):
                    weight = matrix.weight.double()
                    if self.by_loss:
                        weight = _root(gradients.pop(matrix).double()) @ weight
                    xx.diagonal().add_(self.damping * xx.diagonal().mean())
                    scores.append(elimination_costs(weight, xx, parts or matrix.in_features).float().cpu())
                found.append(LayerScores(*scores))
                done(number)
        return found

    def memory(self, work: Workload) -> int:
        """See ``Importance.memory``: the backward pass; or Σ x xᵀ of a layer, its inverse, and what follows from it."""
        products = 2 * len(work.shapes) * work.hidden**2 * SINGLE if self.by_loss else 0
        channels = max(shape.channels for shape in work.shapes)
        elimination = work.states(work.calibration_tokens) + DOUBLE * (6 * channels**2 + 2 * channels * work.hidden)
        return products + max(elimination, work.backward(gates=False) if self.by_loss else 0)


def elimination_costs(weight: Tensor, xx: Tensor, parts: int) -> Tensor:
    """Dearest step on the way to each part's removal, when the cheapest goes first and the rest is refitted.

    Args:
        weight: ``[H, K]``, float64.
        xx: ``[K, K]``, positive definite: Σ x xᵀ and damping.
        parts: Parts of K / parts neighbouring columns each.

    Returns:
        ``[parts]``, float64.
    """
    weight, inverse = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(xx))
    width, left = xx.shape[0] // parts, torch.arange(parts, device=xx.device)
    costs, dearest = torch.zeros(parts, dtype=xx.dtype, device=xx.device), xx.new_zeros(())
    at_once = max(1, parts // _STEPS)
    while len(left):
        own = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        mine = weight.unflatten(1, (-1, width)).permute(1, 2, 0)  # [parts, width, H]
        now = (mine * torch.linalg.solve(own, mine)).sum((1, 2))
        order = now.argsort(stable=True)
        gone, stay = order[:at_once], order[at_once:].sort().values
        for place in gone.tolist():
            dearest = torch.maximum(dearest, now[place])
            costs[left[place]] = dearest
        columns, others = (
            (places[:, None] * width + torch.arange(width, device=xx.device)).flatten() for places in (gone, stay)
        )
        # The inverse of what is left, and the weights that suit it: a Schur complement.
        across = torch.linalg.solve(inverse[columns][:, columns], inverse[columns][:, others])
        weight = weight[:, others] - weight[:, columns] @ across
        inverse = inverse[others][:, others] - inverse[others][:, columns] @ across
        left = left[stay]
    return costs


def _input_products(layer: Any, matrices: Sequence[nn.Linear], inputs: LayerInputs) -> list[Tensor]:
    """Σ x xᵀ over the inputs of each matrix, float64; afterwards the inputs are those of the next layer."""
    found = [torch.zeros(m.in_features, m.in_features, dtype=torch.float64, device=m.weight.device) for m in matrices]

    def adding(total: Tensor) -> Any:
        def hook(module: nn.Module, arguments: Any) -> None:
            x = inputs.on_tokens(arguments[0]).float()
            total.add_(x.T @ x)

        return hook

    hooks = [m.register_forward_pre_hook(adding(total)) for m, total in zip(matrices, found, strict=True)]
    try:
        inputs.advance(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _gradient_products(model: Any, batches: Sequence[dict[str, Tensor]]) -> dict[nn.Linear, Tensor]:
    """Σ g gᵀ over the gradients of the outputs of every ``o_proj`` and ``down_proj``, float32 ``[H, H]``."""
    linears = [m for layer in decoder_layers(model) for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    products = {m: m.weight.new_zeros(m.out_features, m.out_features, dtype=torch.float32) for m in linears}
    current: list[dict[str, Tensor]] = []

    def watching(total: Tensor) -> Any:
        def add(gradient: Tensor) -> None:
            g = tokens_of(gradient, current[-1]).float()
            total.add_(g.T @ g)

        return lambda module, arguments, output: output.register_hook(add) and None

    hooks = [m.register_forward_hook(watching(total)) for m, total in products.items()]
    # Without weights that want gradients, the graph must start somewhere: at the embeddings.
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_(True)))
    try:
        with gradients_of(model, set()), stage("Gradients for refitted", len(batches), "batches") as done:
            for number, batch in enumerate(batches, 1):
                current[:] = [batch]
                backward(model, batch)
                done(number)
    finally:
        for hook in hooks:
            hook.remove()
    return products


def _root(product: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(product)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
