"""A model's layers and what is outside of them, counted without weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_modules.structured_pruning.footprint import Footprint, parameters_of
from lightning_modules.structured_pruning.layers import LayerShape, decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan


@dataclass(frozen=True)
class ModelShape:
    """A model's layers, and what is outside of them.

    Attributes:
        shapes: One entry a decoder layer.
        other_parameters: Embeddings, head and last norm.
        head_parameters: Of the output head, which computes even where it is tied.
        bytes_per_parameter: Of the dtype that weights are stored in.
    """

    shapes: list[LayerShape]
    other_parameters: int
    head_parameters: int
    bytes_per_parameter: int

    @classmethod
    def of(cls, model: Any, bytes_per_parameter: int) -> "ModelShape":
        """Count a model, which may be on the meta device."""
        shapes = [shape_of(layer) for layer in decoder_layers(model)]
        total: int = sum(p.numel() for p in model.parameters())  # counts tied weights once
        head = model.get_output_embeddings().weight.numel()
        return cls(shapes, total - sum(s.parameters for s in shapes), head, bytes_per_parameter)

    def footprint(self, block_size: int, plan: Sequence[LayerPlan] | None = None) -> Footprint:
        """What the model costs at a block of ``block_size`` tokens: all of it, or what a plan keeps."""
        decoder = keys = flops = 0
        for i, shape in enumerate(self.shapes):
            kept = plan[i] if plan is not None else LayerPlan(list(range(shape.groups)), list(range(shape.channels)))
            if kept.dropped:
                continue
            groups, channels = len(kept.groups), len(kept.channels)
            decoder += parameters_of(shape, groups, channels)
            keys += groups * shape.head_dim
            weights = groups * shape.group_parameters + channels * shape.channel_parameters
            flops += 2 * weights + 2 * block_size * groups * shape.n_rep * shape.head_dim
        total = self.other_parameters + decoder
        return Footprint(
            parameters=total,
            decoder_parameters=decoder,
            kv_bytes_per_token=2 * keys * self.bytes_per_parameter,
            flops_per_token=flops + 2 * self.head_parameters,
            weight_bytes=total * self.bytes_per_parameter,
        )
