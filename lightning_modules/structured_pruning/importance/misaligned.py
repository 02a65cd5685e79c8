"""Control: query heads are counted for the wrong key-value head."""

from torch import Tensor

from lightning_modules.structured_pruning.importance.weight_taylor import Salience, WeightTaylor


class Misaligned(WeightTaylor):
    """Like WeightTaylor, but rows of q and columns of o are folded onto those of k and v by ``view(n_rep, G · D)``.

    This is what LLM-Pruner's ``TaylorImportance`` does with grouped queries: head j counts for group j mod G instead of
    j // n_rep. What is removed is still whole groups; only their order is wrong. For comparison only.
    """

    control = True

    def group_scores(self, salience: Salience, groups: int) -> Tensor:
        """See ``WeightTaylor.group_scores``."""
        rows = salience["k_proj"] + salience["v_proj"]
        for name in ("q_proj", "o_proj"):
            # LLM-Pruner writes view(len // min, min).sum(0)
            rows = rows + salience[name].view(-1, rows.numel()).sum(0)
        return rows.view(groups, -1).sum(1)
