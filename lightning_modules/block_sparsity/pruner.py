"""A model's matrices with their tiers and masks: what one iteration changes, and what is saved of it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.block_sparsity import tensor_file
from lightning_modules.block_sparsity.demotion import Ratios, Scope, demote, demote_to, flows, quantiles
from lightning_modules.block_sparsity.masks import groups, unstructured
from lightning_modules.block_sparsity.matrices import linear_layers
from lightning_modules.block_sparsity.packing import DTYPES, Layout
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.scores import Score
from lightning_modules.block_sparsity.tiers import DENSE, MID, TierMap, most_topk, pack_bits, pad, unpack_bits
from lightning_modules.block_sparsity.updates.base import Choice

TIERS_FILE = "tiers.map"  # a safetensors file by another name: engines take all *.safetensors for weights
_OLD_TIERS_FILE = "tiers.safetensors"
_SHARES = ("dense", "mid_2_4", "topk")
Pattern = Literal["tiers", "unstructured", "2:4", "4:8"]
GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}
"""Of how many neighbours in a row how many stay."""


class Pruner:
    """Which weights of a model stay, and how that is decided.

    Args:
        model: A Hugging Face causal language model; every linear layer of its decoder layers is pruned.
        block: Side of a block.
        k: Weights that a top-k block keeps.
        pattern: "tiers"; "unstructured": the same share of zeros, wherever in a row they are; or "2:4" or "4:8"
            throughout, whatever the ratios. All but the tiers are baselines.
        scope: Who competes, see ``demotion.demote``.
        row_relative: Divide scores by the mean score of what their row still has.
        matrix_relative: Divide scores by the mean score of what their matrix still has.
        open_k: Take over the k of maps that are loaded; otherwise another one is refused.

    Attributes:
        matrices: The linear layers by name.
        tiers: Their tier maps; empty for other patterns.
        keep: Their masks, bool ``[R, C]``.
        iteration: Of the schedule, the last that was made; 0 before.
        quantiles: Of the block scores in each tier at the last iteration; empty before it, or without tiers.

    Raises:
        ValueError: See ``TierMap`` and ``linear_layers``.
    """

    def __init__(
        self,
        model: nn.Module,
        block: int = 16,
        k: int = 10,
        pattern: Pattern = "tiers",
        scope: Scope = "matrix",
        row_relative: bool = False,
        matrix_relative: bool = False,
        open_k: bool = False,
    ) -> None:
        self.block, self.k = block, k
        self.pattern, self.scope = pattern, scope
        self.row_relative, self.matrix_relative = row_relative, matrix_relative
        self.open_k = open_k
        self.matrices = linear_layers(model)
        self.parameter_count = sum(p.numel() for p in model.parameters())
        shapes = {name: (m.out_features, m.in_features) for name, m in self.matrices.items()}
        homes = {name: m.weight.device for name, m in self.matrices.items()}
        homes = {n: torch.device("cpu") if home.type == "meta" else home for n, home in homes.items()}  # no weights yet
        tiers = {name: TierMap(name, shape, block, k, homes[name]) for name, shape in shapes.items()}
        self.tiers = tiers if pattern == "tiers" else {}
        self._masks = {} if self.tiers else {n: t.keep_RC for n, t in tiers.items()}
        self.quantiles: dict[str, list[float]] = {}
        self.iteration = 0

    @property
    def keep(self) -> dict[str, Tensor]:
        """See the class."""
        return {name: tiers.keep_RC for name, tiers in self.tiers.items()} or self._masks

    def describe(self) -> dict[str, Any]:
        """What makes a difference to a mask, as plain values."""
        sizes = {"pattern": self.pattern, "block": self.block, "k": self.k}
        return {**sizes, "scope": self.scope, "row": self.row_relative, "matrix": self.matrix_relative}

    def set_topk(self, k: int) -> None:
        """Have top-k blocks keep so many weights, while there are none.

        Raises:
            ValueError: There are some that keep another number.
        """
        if k != self.k and any(tiers.counts()[2] for tiers in self.tiers.values()):
            raise ValueError(f"there are top-k blocks with {self.k} weights already; they cannot have {k}")
        self.k = k
        for tiers in self.tiers.values():
            tiers.k = k

    def target_sparsity(self, target: Ratios) -> float:
        """Share of zeros that ratios lead to, under the pattern."""
        if self.pattern in GROUPS:
            kept, of = GROUPS[self.pattern]
            return 1 - kept / of
        return target.sparsity(self.block, self.k)

    def check_target(self, target: Ratios) -> None:
        """Refuse ratios that would bring blocks back.

        Raises:
            ValueError: See ``demotion.demote``.
        """
        if self.tiers:
            flows(self.tiers, target, self.scope)

    def scored(self, name: str, score: Score, statistic: Tensor | None) -> Scored:
        """How one matrix is scored.

        Args:
            name: The matrix.
            score: The criterion.
            statistic: What it needs to know besides the weights, on their device.
        """
        found = Scored(self.matrices[name].weight.detach(), score.score, statistic)
        if self.row_relative:
            return found.relative_to_rows(self.keep[name])
        return found.relative_to_matrix(self.keep[name]) if self.matrix_relative else found

    def cut(self, name: str, score: Score, statistic: Tensor | None, target: Ratios | Tensor) -> tuple[Tensor, Choice]:
        """A new mask for one matrix; its weights are not touched.

        Args:
            name: The matrix.
            score: The criterion.
            statistic: See ``scored``.
            target: Its ratios afterwards, of which an unstructured mask gets the sparsity; or the tier of every block.

        Returns:
            Mean score of the weights that every block still has, ``float32 [r, c]`` (of no blocks without tiers); and
            what of the mask could as well be chosen otherwise.

        Raises:
            ValueError: See ``demotion.demote`` and ``masks``.
        """
        scored = self.scored(name, score, statistic)
        if self.tiers:
            tiers = self.tiers[name]
            dense_rc = tiers.map_rc == DENSE
            if isinstance(target, Tensor):
                means = demote_to(scored, tiers, target)
            else:
                scope: Scope = "band" if self.scope == "band" else "matrix"
                means = demote({name: scored}, {name: tiers}, target, scope)[name]
            free_rc = dense_rc & (tiers.map_rc == MID)
            free = free_rc.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
            return means, Choice(free[: tiers.shape[0], : tiers.shape[1]], *GROUPS["2:4"])
        assert isinstance(target, Ratios)  # patterns without tiers have no mix of them
        keep = self._masks[name]
        if self.pattern in GROUPS:
            self._masks[name] = groups(scored, *GROUPS[self.pattern], keep)
            return torch.empty(0, 0), Choice(keep, *GROUPS[self.pattern])
        sparsity = self.target_sparsity(target)
        self._masks[name] = unstructured(scored, sparsity, keep)
        return torch.empty(0, 0), Choice(keep, sparsity=sparsity)

    def choose(self, name: str, keep_RC: Tensor) -> None:
        """Replace a mask where ``cut`` said that it could be otherwise."""
        if self.tiers:
            self.tiers[name].choose(keep_RC)
        else:
            self._masks[name] = keep_RC

    def note(self, means: Mapping[str, Tensor]) -> None:
        """Keep quantiles of what ``cut`` gave for all matrices."""
        here = {name: means[name].to(tiers.map_rc.device) for name, tiers in self.tiers.items()}
        self.quantiles = quantiles(here, self.tiers) if here else {}

    # ---- figures ----------------------------------------------------------------------------------------------

    def ratios(self) -> Ratios:
        """Shares of all blocks in each tier as they are."""
        counts = torch.tensor([tiers.counts() for tiers in self.tiers.values()] or [(1, 0, 0)]).sum(0)
        return Ratios(*(counts / counts.sum()).tolist())

    def sparsity(self) -> dict[str, float]:
        """Shares of zeros: "sparsity" of the decoder's linear layers, "model_sparsity" of all parameters."""
        zeros = sum(mask.numel() - int(mask.sum()) for mask in self.keep.values())
        return {
            "sparsity": zeros / sum(mask.numel() for mask in self.keep.values()),
            "model_sparsity": zeros / self.parameter_count,
        }

    def counts(self) -> list[dict[str, Any]]:
        """Blocks of every matrix, and how many are in each tier, for the run record; the maps are in their own file."""
        found = []
        for name, tiers in self.tiers.items():
            size = {"rows": tiers.map_rc.shape[0], "columns": tiers.map_rc.shape[1]}
            found.append({"name": name, **size, **dict(zip(_SHARES, tiers.counts(), strict=True))})
        return found

    def result(self, iterations: list[dict[str, Any]]) -> dict[str, Any]:
        """The record's ``tiers`` block.

        Args:
            iterations: What ``iteration_result`` said after each.
        """
        block = {"iterations": iterations, "matrices": self.counts(), "quantiles": self.quantiles}
        return {"tiers": {**block, **self.sparsity()}}

    def iteration_result(self, iteration: int, ppl: float | None, violations: int) -> dict[str, Any]:
        """One entry of the record's ``tiers.iterations``; an unstructured mask has no shares of tiers."""
        shares = vars(self.ratios()) if self.tiers else dict.fromkeys(_SHARES)
        return {"iteration": iteration, **shares, **self.sparsity(), "ppl": ppl, "violations": violations}

    def plan(self, target: Ratios, values: str = "float16", bands: bool = False) -> dict[str, Any]:
        """What an iteration would leave: ratios, sparsity, and how small it would be when packed.

        Args:
            target: Ratios after the iteration.
            values: Type of the tiers' values when packed.
            bands: Packed in the band form.

        Returns:
            The names and meanings of the record's ``tiers`` block (``common/records/schema.py``). An unstructured mask
            cannot be packed, so it has no sizes.
        """
        sparsity = self.target_sparsity(target)
        weights = sum(mask.numel() for mask in self.keep.values())
        shares = {"sparsity": sparsity, "model_sparsity": sparsity * weights / self.parameter_count}
        if not self.tiers:
            return shares
        bits = packed_bits(target, self.block, self.k, values, bands) * padding(self.tiers.values())
        other = 32 if values == "float32" else 16
        whole = 16 * self.parameter_count / (bits * weights + other * (self.parameter_count - weights))
        return {**asdict(target), **shares, "packed_bits_per_weight": bits, "packed_ratio": whole}

    # ---- saving -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Maps and masks as plain values and small tensors, for checkpoints."""
        sizes = {"pattern": self.pattern, "block": self.block, "k": self.k, "iteration": self.iteration}
        return {**sizes, "quantiles": self.quantiles, "tensors": self.tensors(self.matrices)}

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Maps and masks of some matrices as small tensors."""
        if self.tiers:
            return {f"{n}.{part}": t for n in names for part, t in self.tiers[n].state().items()}
        return {f"{name}.keep": pack_bits(self._masks[name].cpu()) for name in names}

    def load_state(self, state: Mapping[str, Any], source: str) -> None:
        """Take over what ``state`` gave.

        Args:
            state: The state.
            source: Where it comes from, for messages.

        Raises:
            ValueError: It belongs to another model, pattern, block size or k.
        """
        if self.open_k and state["pattern"] == self.pattern and 1 <= state["k"] <= most_topk(self.block):
            self.set_topk(state["k"])
        for field in ("pattern", "block", "k"):
            if state[field] != getattr(self, field):
                name = {"k": "topk"}.get(field, field)
                here = getattr(self, field)
                raise ValueError(
                    f"{source} has {name} {state[field]}, this run has {here}: set {name} to {state[field]}"
                )
        self.quantiles, self.iteration = state.get("quantiles", {}), state.get("iteration", 0)
        names = {name.rpartition(".")[0] for name in state["tensors"]}
        if names != set(self.matrices):
            other = sorted(names ^ set(self.matrices))
            raise ValueError(f"{source} belongs to another model: {other[0]} is in one of the two only")
        for name in self.matrices:
            try:
                self.take(name, state["tensors"])
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None

    def take(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take over one matrix's map and mask from what ``tensors`` gave.

        Raises:
            ValueError: They are missing, or another matrix's.
        """
        parts = {part: tensors.get(f"{name}.{part}") for part in (("map", "keep") if self.tiers else ("keep",))}
        found = {part: tensor for part, tensor in parts.items() if tensor is not None and tensor.dtype == torch.uint8}
        if len(found) < len(parts):
            wrong = next(part for part in parts if part not in found)
            raise ValueError(f"damaged, {name}.{wrong} is missing or no bytes")
        if self.tiers:
            self.tiers[name].load_state(found)
            return
        mask = self._masks[name]
        if len(found["keep"]) != -(-mask.numel() // 8):
            raise ValueError(f"the mask of {name} is of another size: it is another model's")
        self._masks[name] = unpack_bits(found["keep"], mask.numel()).view(mask.shape).to(mask.device)

    def save(self, folder: Path) -> None:
        """Write maps and masks into a model's folder."""
        state = self.state()
        about = {field: str(state[field]) for field in ("pattern", "block", "k", "iteration")}
        if self.tiers:
            about |= {name: f"{share:.6f}" for name, share in vars(self.ratios()).items()}
        tensor_file.write(folder / TIERS_FILE, "tier maps", state["tensors"], about)

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote.

        Args:
            path: The file, or a folder with one.

        Raises:
            FileNotFoundError: There are no tier maps.
            ValueError: They are damaged, or see ``load_state``.
        """
        path = tiers_file(path) or path
        tensors, about = tensor_file.read(path, "tier maps", ("pattern", "block", "k"))
        numbers = {"iteration": "0", **about}
        if not all(numbers[field].isdecimal() for field in ("block", "k", "iteration")):
            raise ValueError(f"{path}: damaged, block, k or iteration is no number; write or fetch it again")
        sizes = {field: int(numbers[field]) for field in ("block", "k", "iteration")}
        self.load_state({"pattern": about["pattern"], **sizes, "tensors": tensors}, str(path))

    def adopt(self, packed: Iterable[tuple[str, Tensor, Tensor, Layout]], iteration: int, source: str) -> None:
        """Take over the tier maps and masks of a packed model.

        Args:
            packed: Name, tier map, mask and layout of every matrix.
            iteration: Of the schedule, the last that was made.
            source: Where they come from, for messages.

        Raises:
            ValueError: See ``load_state``.
        """
        tensors: dict[str, Tensor] = {}
        for name, map_rc, keep_RC, layout in packed:
            tensors |= {f"{name}.map": map_rc, f"{name}.keep": pack_bits(pad(keep_RC, layout.block))}
        sizes = {"pattern": "tiers", "block": layout.block, "k": layout.k, "iteration": iteration}
        self.load_state({**sizes, "tensors": tensors}, source)

    def to(self, device: torch.device) -> None:
        """Move maps and masks."""
        for name in self.matrices:
            self._move(name, device)

    @contextmanager
    def visiting(self, names: Iterable[str], device: torch.device) -> Iterator[None]:
        """Have maps and masks of some matrices on the device for a while."""
        homes = {name: self.keep[name].device for name in names}
        for name in homes:
            self._move(name, device)
        try:
            yield
        finally:
            for name, home in homes.items():
                self._move(name, home)

    def _move(self, name: str, device: torch.device) -> None:
        if self.tiers:
            self.tiers[name].to(device)
        else:
            self._masks[name] = self._masks[name].to(device)


def tiers_file(path: Path) -> Path | None:
    """The tier maps that a path is or holds."""
    found = (path, path / TIERS_FILE, path / _OLD_TIERS_FILE)
    return next((file for file in found if file.is_file()), None)


def packed_bits(target: Ratios, block: int, k: int, values: str = "float16", bands: bool = False) -> float:
    """Bits per weight of whole blocks, packed: values, 2-bit and 8- or 16-bit indices, and where the blocks are.

    With 16-bit values, blocks of 16 and k = 10 this is 16d + 9m + 0.94t + 0.008. int8 values add a 16-bit scale for
    every row of a dense or 2:4 block and for every top-k block; the band form counts 16 bits a block instead of 2.
    """
    bits, index = 8 * DTYPES[values].itemsize, 8 if block * block <= 256 else 16
    scale = 16 if values == "int8" else 0
    dense, mid = bits + scale / block, bits / 2 + 1 + scale / block
    topk = (k * (bits + index) + scale) / block**2
    place = 16 if bands else 2
    return dense * target.dense + mid * target.mid_2_4 + topk * target.topk + place / block**2


def padding(tiers: Iterable[TierMap]) -> float:
    """Weights that packed blocks hold over those that there are: blocks at the edges are packed whole."""
    sizes = [(one.map_rc.numel() * one.block**2, math.prod(one.shape)) for one in tiers]
    return sum(packed for packed, _ in sizes) / sum(there for _, there in sizes)
