"""What is asked of a plan besides its budget: the shape of the result, and where its parameters are taken from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.allocation.inverse import Inverse
from lightning_modules.structured_pruning.layers import LayerShape

Shape = Literal["stock", "free"]
DropBy = Literal["damage", "block_influence"]
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Layout:
    """How a budget is laid out.

    Attributes:
        shape: "stock": one number of groups and one width for all kept layers. "free": every layer its own.
        allocation: Free shapes: how the budget is divided among the layers; Inverse when not given.
        attention_share: Share of the parameters to remove, after dropped layers, that attention gives; the MLPs give
            the rest. "auto": in a stock shape what trials find, in a free one what the allocation says.
        drop_layers: Layers to remove whole. "auto": in a stock shape what trials find, in a free one none.
        drop_by: What orders the layers to drop: the rise of the loss without the layer, or how little it changes.
        protect_layers: Layers that are never dropped; in a free shape they stay whole.
        multiple: Kept channels are a multiple of it.

    Raises:
        ValueError: A value is out of range, or an allocation is given with a stock shape.
    """

    shape: Shape = "stock"
    allocation: Allocation | None = None
    attention_share: float | Literal["auto"] = AUTO
    drop_layers: int | Literal["auto"] = AUTO
    drop_by: DropBy = "damage"
    protect_layers: tuple[int, ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.shape == "stock" and self.allocation is not None:
            raise ValueError(
                "allocation: a stock shape has one width for all layers, so there is nothing to divide; leave "
                "allocation out, or set shape: free"
            )
        if self.attention_share != AUTO and not 0 <= self.attention_share <= 1:
            raise ValueError(f"attention_share must lie between 0 and 1, or be auto; got {self.attention_share}")
        if self.drop_layers != AUTO and self.drop_layers < 0:
            raise ValueError(f"drop_layers must not be negative, or be auto; got {self.drop_layers}")
        if len(set(self.protect_layers)) < len(self.protect_layers):
            raise ValueError("protect_layers names a layer twice")

    @property
    def divides(self) -> Allocation:
        """The allocation of a free shape."""
        return self.allocation or Inverse()

    @property
    def dropped(self) -> int | None:
        """How many layers are dropped; None where trials say."""
        if self.drop_layers == AUTO:
            return None if self.shape == "stock" else 0
        return self.drop_layers

    def check(self, shapes: Sequence[LayerShape]) -> None:
        """Refuse layers that are not there.

        Raises:
            ValueError: More layers are to be dropped than can be, or one is protected that there is not.
        """
        layers = len(shapes)
        for index in self.protect_layers:
            if not 0 <= index < layers:
                raise ValueError(f"protect_layers: layers are numbered 0 to {layers - 1}, got {index}")
        most = min(layers - 1, layers - len(self.protect_layers))
        if self.dropped is not None and self.dropped > most:
            but = f" with {len(self.protect_layers)} protected" if self.protect_layers else ""
            raise ValueError(f"drop_layers must lie between 0 and {most}{but}, got {self.dropped}")

    def droppable(self, shapes: Sequence[LayerShape]) -> list[int]:
        """Indices of layers that may be dropped."""
        return [i for i in range(len(shapes)) if i not in self.protect_layers]

    def settings(self) -> dict[str, Any]:
        """For the plan's reader."""
        allocation = self.divides if self.shape == "free" else None
        return {
            "shape": self.shape,
            **({"allocation": {"name": allocation.name, **allocation.config()}} if allocation else {}),
            "attention_share": self.attention_share,
            "drop_layers": self.drop_layers,
            "drop_by": self.drop_by,
            "protect_layers": list(self.protect_layers),
            "channel_multiple": self.multiple,
        }
