"""What pruning costs on held-out text, and how well scores agree with saliency."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import PreTrainedModel

from lightning_modules.batches import logits as logits_of
from lightning_modules.metrics import WeightedMean
from lightning_modules.perplexity import perplexity
from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.passes import ending_at, watched
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.samples import Samples, response_logits, response_nll
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Context, Scorer
from lightning_modules.token_pruning.scorers.random import Random
from lightning_modules.token_pruning.scorers.recency import Recency
from lightning_modules.token_pruning.selection import take
from lightning_modules.token_pruning.soft_mask import Budget, Pruning, layer_inputs
from lightning_modules.token_pruning.targets import Target

Score = Callable[[int, Tensor, Tensor], Tensor]


def pruned_nll(
    model: PreTrainedModel, samples: Samples, schedule: Schedule, scorer: TokenPruner | Scorer
) -> tuple[Tensor, Tensor, Pruning]:
    """Negative log-likelihood of the responses after prompts pruned for good, in one forward pass.

    Args:
        model: A causal language model with an attention that takes masks.
        samples: Prompts and responses.
        schedule: Where and how much to prune.
        scorer: A trained pruner, or a scorer that is ready for the model, see ``Scorer.prepare``.

    Returns:
        Sums in nats [B], numbers of response tokens [B], and what was pruned.
    """
    budget = Budget.of(schedule, model.config.num_hidden_layers, samples.prompt)
    kind = scorer.network if isinstance(scorer, TokenPruner) else scorer
    score = scoring(model, samples, budget, scorer)
    pruning = Pruning(score, samples.prompt, budget, pool=kind.pool, asking=kind.asking)
    with layer_inputs(model, samples.real, pruning):
        logits = response_logits(model, samples)
    return *response_nll(logits, samples.labels), pruning


def scoring(model: PreTrainedModel, samples: Samples, budget: Budget, scorer: TokenPruner | Scorer) -> Score:
    """A scorer as ``Pruning`` calls it."""
    if isinstance(scorer, TokenPruner):
        return lambda layer, hidden, there: scorer(hidden, layer, there)
    parts = anatomy(model)
    places_BN = samples.inputs()["position_ids"]

    def score(layer: int, hidden_BNH: Tensor, there_BN: Tensor) -> Tensor:
        # shown is what the pruned prefill would show: only tokens that are there, short rows padded on the left
        order_BN = there_BN.to(torch.uint8).argsort(dim=1, stable=True)
        index_BK = order_BN[:, -int(there_BN.sum(1).max()) :]
        left_BKH = take(hidden_BNH, index_BK.to(hidden_BNH.device))
        parts_BN = there_BN, budget.protected, places_BN
        real_BK, protected_BK, places_BK = (part.gather(1, index_BK) for part in parts_BN)
        rotary = parts.rotary(left_BKH, places_BK.to(left_BKH.device))
        tokens = tuple(budget.tokens[budget.stages.index(layer)])
        context = Context(parts, index_BK, None if bool(real_BK.all()) else real_BK, protected_BK, tokens, rotary)
        scores_BK = scorer.score(left_BKH, layer, context).to(there_BN.device).float()
        return torch.zeros_like(there_BN, dtype=scores_BK.dtype).scatter(1, index_BK, scores_BK)

    return score


class PruningQuality(nn.Module):
    """Perplexity of responses by scorer and share kept, and rank correlation with saliency by layer.

    Args:
        keep: Shares per stage to prune to.
    """

    def __init__(self, keep: list[float]) -> None:
        super().__init__()
        self.keep = keep
        self.baselines: dict[str, Scorer] = {"random": Random(), "recency": Recency()}
        # all of them from the start: a rank that has nothing to add to one must still take part in its sum
        arms = [f"{name}_{share:g}" for share in keep for name in ("learned", *self.baselines)]
        self.means: Any = nn.ModuleDict({_key(f"nll {name}"): WeightedMean() for name in ("unpruned", *arms)})

    def expect(self, layers: Sequence[int]) -> None:
        """Name the layers after which scores will be compared with saliency, on every rank the same."""
        for layer in layers:
            if (key := _key(f"spearman {layer}")) not in self.means:
                self.means[key] = WeightedMean()

    def update(
        self,
        model: PreTrainedModel,
        pruner: TokenPruner,
        schedule: Schedule,
        target: Target | None,
        samples: Samples,
    ) -> None:
        """Measure on one batch; outside of inference mode, if there is a target, whose layers were told `expect`."""
        self._nll("unpruned", *response_nll(response_logits(model, samples), samples.labels))
        scorers: dict[str, TokenPruner | Scorer] = {"learned": pruner, **self.baselines}
        for keep in self.keep:
            for name, scorer in scorers.items():
                nll, tokens, _ = pruned_nll(model, samples, schedule.keeping(keep), scorer)
                self._nll(f"{name}_{keep:g}", nll, tokens)
        if target is not None:
            self._correlate(model, pruner, schedule, target, samples)

    def _nll(self, name: str, nll: Tensor, tokens: Tensor) -> None:
        self._add(f"nll {name}", nll.double().sum(), tokens.sum())

    def _correlate(
        self, model: PreTrainedModel, pruner: TokenPruner, schedule: Schedule, target: Target, samples: Samples
    ) -> None:
        """Spearman's rank correlation over the tokens of each prompt that may be dropped; unpruned hidden states."""
        budget = Budget.of(schedule, model.config.num_hidden_layers, samples.prompt)
        values = target.values(model, samples, budget.stages)
        scores: dict[int, Tensor] = {}

        def see(index: int, hidden_BNH: Tensor, _: Any) -> None:
            if index - 1 in budget.stages:
                scores[index - 1] = pruner(hidden_BNH, index - 1, samples.prompt).to(samples.prompt.device)

        with watched(model, see), ending_at(model, budget.stages[-1] + 1):
            logits_of(model, samples.inputs())
        free = samples.prompt & ~budget.protected
        for layer in budget.stages:
            for row in range(len(free)):
                if free[row].sum() > 2:
                    found = spearman_corrcoef(scores[layer][row, free[row]], values[layer][row, free[row]])
                    # there is no correlation where all scores or all saliencies are equal
                    self._add(f"spearman {layer}", found.nan_to_num(0.0), found.isfinite().sum())

    def _add(self, name: str, total: Tensor, weight: Tensor) -> None:
        mean = self.means[_key(name)]
        mean.update(total.to(mean.total.device), weight.to(mean.weight.device))

    def compute(self) -> dict[str, Any]:
        """Metrics by the name they are logged under, over all ranks; those that no rank added to are left out."""
        found = {}
        for key, mean in self.means.items():
            kind, _, name = key.partition(" ")
            with mean.sync_context():
                total, weight = mean.total.item(), mean.weight.item()
            if not weight:
                continue
            value = total / weight
            if kind == "spearman":
                found[f"val/spearman_{name}"] = value
            elif name == "unpruned":
                found |= {"val/loss": value, "val/ppl": perplexity(value)}
            else:
                found[f"val/ppl_{name}"] = perplexity(value)
        return found

    def reset(self) -> None:
        """Start again."""
        for mean in self.means.values():
            mean.reset()


def _key(name: str) -> str:
    """A metric's name as a module may have it."""
    return name.replace(".", "_")
