"""What is kept of every layer, as data: slicing, verification and reports read only this."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.files import write_text
from lightning_modules.structured_pruning.layers import LayerShape, query_heads_of

FILE = "pruning_plan.json"
_FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """What is kept of one layer.

    Attributes:
        groups: Kept key-value heads, ascending; none, with no channels, removes the whole layer.
        channels: Kept MLP channels, ascending.
        query_heads: Kept query heads where they are not simply those of ``groups``: only the labelled control that
            breaks the pairing says so.
    """

    groups: list[int]
    channels: list[int]
    query_heads: list[int] | None = None

    @property
    def dropped(self) -> bool:
        """Whether the whole layer goes."""
        return not self.groups and not self.channels

    def queries(self, n_rep: int) -> list[int]:
        """The kept query heads."""
        return query_heads_of(self.groups, n_rep) if self.query_heads is None else self.query_heads


@dataclass(frozen=True)
class PruningPlan:
    """What is kept of a model, and where that decision came from.

    Attributes:
        layers: One entry a layer of the model as it was.
        shapes: ``[groups, channels]`` of every layer as it was; a plan for another model is refused by them.
        base: Folder or hub name of the model that the plan is for.
        base_hash: Hash of that model's weights, see ``provenance.model_hash``.
        settings: Importance, allocation, budget, calibration and their hashes, for the reader.
    """

    layers: list[LayerPlan]
    shapes: list[list[int]]
    base: str
    base_hash: str
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the plan, complete or not at all."""
        content = {"format": _FORMAT, **asdict(self)}
        write_text(path, json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "PruningPlan":
        """Read a plan.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a pruning plan, or is damaged; the message names the entry.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no pruning plan at {path}: run prune first, or give the plan's path")
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read.pop("sha256", None) not in (None, _digest(read)):  # plans of before have none
                raise ValueError("it was changed; delete its sha256 if that was on purpose")
            if read.pop("format") != _FORMAT:
                raise ValueError(f"not of format {_FORMAT}")
            layers = [LayerPlan(**entry) for entry in read.pop("layers")]
            plan = cls(layers=layers, **read)
            plan.check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a pruning plan of this version, or is damaged: {error}") from error
        return plan

    def check(self) -> None:
        """Refuse a plan that contradicts itself.

        Raises:
            ValueError: The message names the layer and what is wrong with it.
        """
        self._check_types()
        if len(self.layers) != len(self.shapes):
            raise ValueError(f"{len(self.layers)} layers but {len(self.shapes)} shapes")
        if all(layer.dropped for layer in self.layers):
            raise ValueError("no layer is kept")
        for i, (layer, (groups, channels)) in enumerate(zip(self.layers, self.shapes, strict=True)):
            for name, kept, of in (("groups", layer.groups, groups), ("channels", layer.channels, channels)):
                if any(b <= a for a, b in itertools.pairwise(kept)):
                    raise ValueError(f"layer {i}: kept {name} are not ascending")
                if kept and not 0 <= kept[0] <= kept[-1] < of:
                    raise ValueError(f"layer {i}: kept {name} must lie in 0 … {of - 1}")
            if bool(layer.groups) != bool(layer.channels):
                missing = "groups" if not layer.groups else "channels"
                raise ValueError(f"layer {i}: no {missing} are kept; keep at least one, or drop the whole layer")

    def _check_types(self) -> None:
        """What JSON may hold instead of what is meant."""
        for i, layer in enumerate(self.layers):
            for name, kept in asdict(layer).items():
                if not (_are_counts(kept) or (kept is None and name == "query_heads")):
                    raise ValueError(f"layer {i}: {name} must be a list of whole numbers, not negative")
        for i, shape in enumerate(self.shapes):
            if not _are_counts(shape) or len(shape) != 2:
                raise ValueError(f"shapes: that of layer {i} must be two whole numbers, groups and channels")
        if not isinstance(self.base, str) or not isinstance(self.base_hash, str) or not isinstance(self.settings, dict):
            raise ValueError("base and base_hash must be texts, and settings an object")

    def check_fits(self, shapes: list[LayerShape], model_hash: str | None = None) -> None:
        """Refuse a plan that was made for another model.

        Args:
            shapes: The layers of the model at hand.
            model_hash: Its hash; None where weights are not at hand (on the meta device).

        Raises:
            ValueError: Layers or weights are not those that the plan was made for.
        """
        if self.shapes != [[shape.groups, shape.channels] for shape in shapes]:
            raise ValueError(
                f"plan: made for {self.base}, with layers of other numbers of groups or channels than this model's"
            )
        if model_hash is not None and model_hash != self.base_hash:
            raise ValueError(
                f"plan: made for {self.base} with weights {self.base_hash[:12]}, but this model's are "
                f"{model_hash[:12]}; prune the model again, or give the model that the plan was made for"
            )


def _digest(content: dict[str, Any]) -> str:
    """Hash of a plan's content as JSON, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
