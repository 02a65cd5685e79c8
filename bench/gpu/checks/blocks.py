"""Weights in tiers on the GPU: demotion as on the CPU, packed and back bit by bit, and the kernel's products."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.setting import Setting, at_most
from lightning_modules.block_sparsity.bands import band_product, to_bands
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.packing import Layout, pack, unpack
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.tiers import TierMap

LIMIT_S, GPUS = 50.0, 1


@torch.no_grad()
def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Places that differ, and the largest difference of products."""
    side = setting.size(1024, 64)
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    maps = []
    for device in (torch.device("cpu"), setting.device):
        tiers = TierMap("m", (side, side), 16, 10, device)
        here = weight.to(device)
        demote({"m": Scored(here, Magnitude().score)}, {"m": tiers}, Ratios(0.3, 0.4, 0.3), "band")
        maps.append(tiers)
    differing = int((maps[0].keep_RC != maps[1].keep_RC.cpu()).sum())
    yield at_most("demotion", "kept places that differ from the CPU's", differing, 0)
    tiers, layout = maps[1], Layout(side, side, 16, 10)
    pruned = weight.to(setting.device).masked_fill(~tiers.keep_RC, 0.0)
    back = unpack(pack(pruned, tiers, torch.float32), layout, torch.float32)
    yield at_most("packing", "weights that differ after packing and unpacking", int((back != pruned).sum()), 0)
    for dtype in (torch.float16, torch.int8):
        parts = to_bands(pack(pruned, tiers, dtype), layout, "m")
        x = torch.randn(4, side, device=setting.device)
        wanted = x @ unpack(pack(pruned, tiers, dtype), layout, torch.float32).T
        apart = float((product(setting)(x, parts, layout, None) - wanted).abs().max() / wanted.abs().max())
        name = str(dtype).removeprefix("torch.")
        yield at_most(f"product-{name}", f"difference of products with bands of {name}", apart, 1e-3)


def product(setting: Setting) -> Any:
    """The kernel, or on a CPU the reference that it repeats."""
    if setting.device.type == "cpu":
        return band_product
    from lightning_modules.block_sparsity.triton_bands import kernel_product

    return kernel_product
