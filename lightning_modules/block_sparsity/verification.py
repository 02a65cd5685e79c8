"""Whether a packed model is the pruned one it was made from."""

from pathlib import Path
from typing import Any

import torch

from common.manifest import check_manifest
from common.progress import stage
from lightning_modules.batches import logits
from lightning_modules.block_sparsity.lora import plain_state
from lightning_modules.block_sparsity.masks import violations
from lightning_modules.block_sparsity.packed_model import build, read_packed
from lightning_modules.block_sparsity.packing import Layout, pack, unpack
from lightning_modules.block_sparsity.pruner import Pruner


@torch.no_grad()
def compare(model: Any, pruner: Pruner, folder: Path, data: Any, device: torch.device) -> dict[str, Any]:
    """Compare tier maps, masks, every weight, and the logits of one validation batch.

    Weights are compared bit for bit with what the packed types make of the pruned model's. Packed and expanded layers
    must give the same logits; in the band form, whose products are made in pieces, up to rounding.

    Returns:
        What was compared, and how far apart the logits are from the unrounded model's.

    Raises:
        ValueError: Something differs, with its name.
    """
    check_manifest(folder)
    read = read_packed(folder)
    kept = {name: (tier_map, keep) for name, tier_map, keep, _ in read.tiers()}
    if set(kept) != set(pruner.tiers):
        raise ValueError(f"{folder} packs other matrices than the pruned model has")
    for name, tiers in pruner.tiers.items():
        if not (torch.equal(kept[name][0], tiers.map_rc) and torch.equal(kept[name][1], tiers.keep_RC)):
            raise ValueError(f"{name}: the packed tier map or mask differs from the pruned model's")
    values, others = read.types()
    expanded: Any = build(read, torch.float32)
    packed: Any = build(read, torch.float32, expand=False)
    unpacked, state = expanded.state_dict(), plain_state(model)
    with stage("Comparing weights", len(state), "tensors") as done:
        for number, (name, weight) in enumerate(state.items(), 1):
            found, matrix = unpacked[name], name.removesuffix(".weight")
            wanted = weight.to(others).float()
            if matrix in kept:
                tiers = pruner.tiers[matrix]
                layout = Layout(*tiers.shape, tiers.block, tiers.k)
                wanted = unpack(pack(weight, tiers, values), layout, torch.float32)
            if not torch.equal(found, wanted):
                raise ValueError(f"{name}: the packed weights differ from the pruned model's")
            if matrix in kept and (found[~kept[matrix][1]] != 0).any():
                raise ValueError(f"{name}: a pruned weight is not zero after unpacking")
            done(number)
    bad = violations(pruner.matrices, pruner.keep)  # while weights and masks are on one device
    batch = next(iter(data.val_dataloader()))
    pruned = logits(model.to(device), batch)
    plain = logits(expanded.to(device), batch)
    apart = (plain - logits(packed.to(device), batch)).abs().max() / plain.abs().max()
    if not apart <= (1e-4 if read.in_bands() else 0.0):  # NaN is not
        raise ValueError("layers that stay packed give other logits than expanded ones")
    return {
        "matrices": len(kept),
        "weights_equal": True,
        "logits_equal": bool(apart == 0),
        "logits_change": float((plain - pruned).abs().max()),
        "violations": bad,
    }
