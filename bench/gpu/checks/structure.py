"""A structurally pruned model on the GPU computes what the dense one does with the same parts zeroed."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.models import small
from bench.gpu.setting import Setting, at_most
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.verify import proven_slice

LIMIT_S, GPUS, _TOLERANCE = 30.0, 1, 1e-6


@torch.no_grad()
def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The largest difference of logits, in float64."""
    model = small(setting)
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    kept = [LayerPlan([0, 2], [*range(0, 256, 2)]), LayerPlan([0, 1, 2, 3], [*range(256)])] * 2
    plan = PruningPlan(kept, [[s.groups, s.channels] for s in shapes], "random", model_hash(model))
    ids = torch.randint(1, 512, (2, 64), generator=torch.Generator().manual_seed(0)).to(setting.device)
    _, proof = proven_slice(model, plan, ids, _TOLERANCE)
    share = proof.zeroed_and_sliced / proof.largest_logit
    yield at_most("oracle", "largest difference of logits, as a share of the largest", share, _TOLERANCE)
