"""What a rank still owes: gradients that compression held back, kept per FSDP unit, saved and restored.

A residual is the rank's own and as long as the unit's whole flat gradient, so it undoes part of what sharding saves;
bfloat16 and int8 storage make it two and four times smaller.

State tensors are named in ``Unit.state``. Names that start with one of ``OWED`` are gradients still to be sent: their
mean over ranks is what counts, and it is kept when a run resumes on another number of ranks. All else is rebuilt.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.units import Unit

OWED = ("residual", "momentum")
Storage = Literal["float32", "bfloat16", "int8"]
_STORED_AS: dict[torch.dtype, Storage] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_BLOCK = 256  # elements that share a scale in int8 storage


def load(unit: Unit, name: str, numel: int, device: torch.device) -> Tensor:
    """The owed gradient ``name`` as ``float32 [numel]``; zeros when there is none. May be the stored tensor itself."""
    stored = unit.state.get(name)
    if stored is None:
        return torch.zeros(numel, device=device, dtype=torch.float32)
    return _decode(stored, unit.state.get(f"{name}.scales"))


def store(unit: Unit, name: str, owed: Tensor, storage: Storage = "float32") -> None:
    """Keep ``owed float32 [N]``, which must be finite."""
    unit.state |= {f"{name}{suffix}": part for suffix, part in _encode(owed, storage).items()}


def settle(left: Tensor, owed: Tensor) -> None:
    """Owe what is ``left``, which is used up; where that is NaN or Inf, ``owed`` (finite) stays as it is."""
    if left.device.type == "cpu" and not torch.compiler.is_compiling():
        # the same in arithmetic alone: outside compiled code, comparing and choosing take three times as long
        lost = (left - left).nan_to_num_(nan=1.0)  # 1 where left is NaN or Inf, else 0
        torch.addcmul(left.nan_to_num_(0.0, 0.0, 0.0), owed, lost, out=owed)
    else:
        owed.copy_(torch.where(left.abs() < torch.inf, left, owed))


def norm(units: Iterable[Unit]) -> Tensor | None:
    """L2 norm of this rank's residuals over all units, on device; None when no method keeps any."""
    squares = [
        load(unit, "residual", 0, unit.state["residual"].device).square().sum()
        for unit in units
        if "residual" in unit.state
    ]
    return torch.stack(squares).sum().sqrt() if squares else None


def nbytes(unit: Unit) -> int:
    """Memory of what a unit's method keeps between steps."""
    return sum(part.nbytes for part in unit.state.values())


def collect(units: list[Unit], method: str) -> dict[str, Any]:
    """This rank's state of all units, for a checkpoint: plain tensors, numbers and strings (``weights_only`` loads it).

    In host memory: other ranks' GPUs, from which pickled tensors would come back, are not this one's.

    Args:
        units: The engine's units.
        method: What identifies the compressor, its ``repr``.
    """
    return {
        "method": method,
        "units": {
            unit.name: {
                "layout": _layout(unit),
                "shard": list(unit.shard),
                "state": {name: part.cpu() for name, part in unit.state.items()},
            }
            for unit in units
        },
    }


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's state lies in a sharded checkpoint."""
    return folder / f"compressor.rank{rank}.pt"


def saved_ranks(folder: Path) -> list[dict[str, Any]]:
    """The states of all ranks in a sharded checkpoint, memory-mapped; empty when it was saved without any."""
    files = [rank_file(folder, rank) for rank in range(len(list(folder.glob("compressor.rank*.pt"))))]
    return [torch.load(file, weights_only=True, mmap=True, map_location="cpu") for file in files]


def restore(ranks: list[dict[str, Any]], units: list[Unit], method: str, device: torch.device) -> None:
    """Fill ``Unit.state`` from what every rank had collected; on another number of ranks, see ``split``.

    Raises:
        ValueError: The state belongs to another compressor or to another model.
    """
    if not any(unit["state"] for saved in ranks for unit in saved["units"].values()):
        return
    misfit = ValueError(
        "the checkpoint's residuals belong to another model, or to other units or fragments of it. Resume with the "
        "config that the run saved beside its logs."
    )
    if ranks[0]["method"] != method:
        raise ValueError(
            f"the checkpoint holds what {ranks[0]['method']} had yet to send, which {method} cannot take over. Resume "
            "with the same compressor, or start a new run from the weights."
        )
    # by global rank: under hybrid sharding a unit's group is smaller than the world
    rank, same = dist.get_rank(), len(ranks) == dist.get_world_size()
    names, of = {unit.name for unit in units}, [ranks[rank]] if same else ranks
    if any(set(saved["units"]) != names for saved in of):
        raise misfit
    for unit in units:
        saved = [one["units"][unit.name] for one in of]
        alike = [one for one in saved if one.get("shard", [0, 1]) == list(unit.shard)]
        if not alike:
            raise ValueError(
                f"the checkpoint's residuals of {unit.name!r} belong to other shards than there are now: resume with "
                "as many ranks in each replica as before"
            )
        owing = same or any(name.startswith(OWED) for one in alike for name in one["state"])
        compared = list if same else _sizes
        if owing and any(compared(one["layout"]) != compared(_layout(unit)) for one in alike):
            raise misfit
        states = [one["state"] for one in alike]
        own = states[0] if same else split(states, alike[0]["layout"], unit) if owing else {}
        unit.state.clear()
        unit.state |= {name: part.to(device, copy=True) for name, part in own.items()}


def _padded(unit: Unit) -> int:
    """Elements of the flat gradient as the compressor gets it: a multiple of the number of ranks."""
    return -(-unit.numel // unit.world_size) * unit.world_size


def _layout(unit: Unit) -> list[Any]:
    return [[parameter.fqn, list(parameter.shape), parameter.offset] for parameter in unit.parameters]


def _sizes(layout: list[Any]) -> dict[str, int]:
    """Elements of every parameter, which may lie in several pieces."""
    found: dict[str, int] = {}
    for fqn, shape, _ in layout:
        found[fqn] = found.get(fqn, 0) + math.prod(shape)
    return found


def split(ranks: list[dict[str, Tensor]], layout: list[Any], unit: Unit) -> dict[str, Tensor]:
    """State for every rank of another number of ranks.

    A step applies the mean of what the ranks send, so what is still due is Σe/n over the old ranks. When each new rank
    owes exactly that, the mean over the new ranks is the same.

    Args:
        ranks: State of every old rank.
        layout: Where its parameters lie in it, see ``collect``: other than now where ranks hold rows of each (FSDP2).
        unit: The unit now.
    """
    result: dict[str, Tensor] = {}
    for name in ranks[0]:
        if not name.startswith(OWED) or name.endswith(".scales"):
            continue
        stored = ranks[0][name]
        total = torch.zeros(stored.numel(), dtype=torch.float32)
        for state in ranks:
            total += _decode(state[name], state.get(f"{name}.scales")).cpu()
        moved = _moved(total / len(ranks), layout, unit)
        result |= {f"{name}{suffix}": part for suffix, part in _encode(moved, _STORED_AS[stored.dtype]).items()}
    return result


def _moved(flat: Tensor, layout: list[Any], unit: Unit) -> Tensor:
    """What lies in one layout, in the unit's; pieces of a parameter follow one another in both."""
    found = torch.zeros(_padded(unit), dtype=flat.dtype)
    pieces: dict[str, list[Tensor]] = {}
    for fqn, shape, offset in layout:
        pieces.setdefault(fqn, []).append(flat[offset : offset + math.prod(shape)])
    whole = {fqn: torch.cat(parts) for fqn, parts in pieces.items()}
    for parameter in unit.parameters:
        here, whole[parameter.fqn] = whole[parameter.fqn].tensor_split([parameter.numel])
        found[parameter.offset : parameter.offset + parameter.numel] = here
    return found


def _encode(owed: Tensor, storage: Storage) -> dict[str, Tensor]:
    if storage == "float32":
        return {"": owed}
    if storage == "bfloat16":
        return {"": owed.to(torch.bfloat16)}
    blocks = torch.nn.functional.pad(owed, (0, -owed.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / scales.clamp_min(1e-30)).round_().to(torch.int8)
    return {"": codes.view(-1)[: owed.numel()], ".scales": scales}


def _decode(stored: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        return stored.float()
    blocks = torch.nn.functional.pad(stored, (0, -stored.numel() % _BLOCK)).view(-1, _BLOCK)
    return (blocks * scales).view(-1)[: stored.numel()]
