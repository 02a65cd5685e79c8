"""Weights times their gradients."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch, labels
from lightning_modules.block_sparsity.scores.base import Score
from lightning_modules.perplexity import next_token_nll
from lightning_modules.stream import backward


class Gradient(Score):
    """|W·g|: the first-order change of the loss when the weight becomes zero. Molchanov et al., arXiv 1906.10771.

    |g| is averaged over calibration batches, so that signs do not cancel. Takes a backward pass over the calibration
    text, a layer at a time, and one float32 copy of the matrices; each weight's gradient is reduced and freed as soon
    as it is there.
    """

    def statistics(
        self, model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        """Mean absolute gradients ``float32 [R, C]``.

        Raises:
            ValueError: There is no calibration text.
        """
        if not batches:
            raise ValueError("calibration needs at least one batch of text")
        training = model.training
        model.eval()
        found = {name: torch.zeros_like(m.weight, dtype=torch.float32) for name, m in matrices.items()}
        wanted = {m.weight: found[name] for name, m in matrices.items()}
        required = {p: p.requires_grad for p in model.parameters()}
        kept = {p: p.grad for p in model.parameters()}

        def reduce(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total = wanted[parameter]
            total.add_(parameter.grad.float().abs().to(total.device), alpha=1 / len(batches))
            parameter.grad = None

        for p in required:
            p.requires_grad_(p in wanted)
            p.grad = None

        def mean_loss(batch: Batch) -> Callable[[Tensor], Tensor]:
            def loss(scores: Tensor) -> Tensor:
                nll, tokens = next_token_nll(scores, labels(batch).to(scores.device))
                return nll / tokens.clamp_min(1)

            return loss

        hooks = [p.register_post_accumulate_grad_hook(reduce) for p in wanted]
        try:
            with stage("Gradients", len(batches), "batches") as done:
                for number, batch in enumerate(batches, 1):
                    backward(model, batch, device, mean_loss(batch))
                    done(number)
        finally:
            for hook in hooks:
                hook.remove()
            for p, needed in required.items():
                p.requires_grad_(needed)
                p.grad = kept[p]
            model.train(training)
        return found

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        return weight.float().abs().mul_(statistic)
