"""Pruning without removing anything: dropped tokens stay, and a mask hides them from all others in later layers.

Independent of the product's mechanism: no cache, no gathering, own masks, one full forward pass per question.
"""

from collections.abc import Sequence

import torch

from lightning_modules.token_pruning.anatomy import anatomy


@torch.no_grad()
def masked_logits(model, input_ids, after: Sequence[int], kept: torch.Tensor, attention_mask=None):
    """Logits [B, N, V] of whole sequences whose prompt (the first columns) loses tokens.

    Args:
        after: Pruning points.
        kept: bool [stages, B, prompt columns].
        attention_mask: [B, N]; padding on the left.
    """
    parts = anatomy(model)
    rows, width = input_ids.shape
    real = torch.ones(rows, width, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    itself = torch.eye(width, dtype=torch.bool)

    def hook(index):
        visible = real.clone()
        stage = sum(layer < index for layer in after)
        if stage:
            visible[:, : kept.shape[-1]] &= kept[stage - 1]
        allowed = (causal & visible[:, None, :]) | itself
        mask = torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min)

        def before(_, args, kwargs):
            call = dict(zip(parts.arguments, args, strict=False)) | kwargs
            return (call.pop("hidden_states"),), call | {"attention_mask": mask}

        return before

    handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(parts.layers)]
    positions = (real.long().cumsum(-1) - 1).clamp_min(0)
    try:
        return model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
