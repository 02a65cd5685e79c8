"""The kernel for weights in tiers beside a dense product, and beside what its bytes allow.

Weights come from memory, as in decoding, where the other layers' have passed through the cache meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.checks.blocks import product
from bench.gpu.setting import Setting, at_least, found
from common.measure.timing import interleaved, queued, ratio_with_spread
from lightning_modules.block_sparsity.bands import to_bands
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.packing import Layout, pack
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.tiers import TierMap

LIMIT_S, GPUS = 50.0, 1
_RATIOS = Ratios(0.35, 0.45, 0.20)
_CALLS = 16  # timed at once


@torch.no_grad()
def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Products of 1, 4 and 16 rows, as in decoding."""
    side, dtype = setting.size(8192, 64), torch.float16 if setting.device.type == "cuda" else torch.float32
    weight = torch.randn(side, side, device=setting.device, dtype=dtype)
    tiers, layout = TierMap("m", (side, side), 16, 10, setting.device), Layout(side, side, 16, 10)
    demote({"m": Scored(weight, Magnitude().score)}, {"m": tiers}, _RATIOS, "band")
    weight.masked_fill_(~tiers.keep_RC, 0.0)
    bands = {
        name: to_bands(pack(weight, tiers, kind), layout, "m") for name, kind in (("", dtype), ("-int8", torch.int8))
    }
    timing: dict[str, Any] = {"repeats": setting.size(50, 1), "warmup": setting.size(5, 1)}
    if setting.device.type == "cuda":
        timing["clock"] = partial(queued, device=setting.device, calls=_CALLS)
    weights = [parts["weight"] for parts in _copies({"weight": weight})]
    packed = {name: _copies(parts) for name, parts in bands.items()}
    for rows in (1, 4, 16):
        x = torch.randn(rows, side, device=setting.device, dtype=dtype)
        arms = {"dense": in_turns(partial(F.linear, x), weights)}
        arms |= {name: in_turns(partial(product(setting), x, layout=layout), parts) for name, parts in packed.items()}
        times = interleaved(arms, **timing)
        for name, parts in bands.items():
            faster = ratio_with_spread(times["dense"], times[name])
            bound = weight.nbytes / sum(part.nbytes for part in parts.values())
            what = f"{rows} rows by bands{name.replace('-', ' of ')}, over dense (bound by bytes {bound:.2f} ×)"
            figure = f"{rows}{name}"
            numbers: dict[str, Any] = {
                "ms": {arm: taken for arm, taken in times.items() if arm in ("dense", name)},
                "bound": bound,
            }
            if rows == 1:
                yield at_least(figure, what, faster["ratio"], 1.0, "×", **numbers) | {"spread": faster["spread"]}
            else:
                yield found(figure, what, faster["ratio"], "×", spread=faster["spread"], **numbers)


def in_turns(call: Callable[[Any], object], operands: Sequence[Any]) -> Callable[[], object]:
    """A call that takes the next operand each time: none finds its own in the cache."""
    following = cycle(operands)
    return lambda: call(next(following))


def _copies(parts: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Copies that together are twice what the GPU's cache holds."""
    device = next(iter(parts.values())).device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = 1 + 2 * cache // sum(part.nbytes for part in parts.values())
    return [{name: part.clone() for name, part in parts.items()} for _ in range(copies)]
