"""Control: every tensor is cut for itself, and queries are truncated until the shapes fit."""

from torch import Tensor

from lightning_modules.structured_pruning.importance.weight_taylor import Salience, WeightTaylor


class PerTensorTruncation(WeightTaylor):
    """Key-value heads are chosen by their own weights alone, and the first query heads stay, whatever they read.

    What tools do that prune k_proj and q_proj separately and then truncate q_proj and o_proj to the shape that is
    asked for: query heads end up with key-value heads they were not trained with, so the result computes something
    else than the dense model with parts removed, and ``verify`` says so. Channels are chosen as by WeightTaylor. For
    comparison only.
    """

    control = True

    def group_scores(self, salience: Salience, groups: int) -> Tensor:
        """See ``WeightTaylor.group_scores``."""
        return (salience["k_proj"] + salience["v_proj"]).view(groups, -1).sum(1)

    def query_heads(self, groups: list[int], n_rep: int) -> list[int]:
        """See ``Importance.query_heads``: the first ones."""
        return list(range(len(groups) * n_rep))
