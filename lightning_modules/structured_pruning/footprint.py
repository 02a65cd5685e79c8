"""What a model of given layers costs, counted without weights."""

from dataclasses import asdict, dataclass

from lightning_modules.structured_pruning.layers import LayerShape


@dataclass(frozen=True)
class Footprint:
    """Costs of a model.

    Attributes:
        parameters: Of the whole model; tied weights count once.
        decoder_parameters: Of the decoder layers.
        kv_bytes_per_token: Keys and values that one token leaves in the cache.
        flops_per_token: Of a forward pass over a whole block, per token; a multiplication and an addition are two, and
            a token attends to half of the block on average.
        weight_bytes: Of the weights on disk.
    """

    parameters: int
    decoder_parameters: int
    kv_bytes_per_token: int
    flops_per_token: int
    weight_bytes: int

    def fields(self, when: str) -> dict[str, int]:
        """The values by name and ``when`` ("before" or "after"), for records."""
        return {f"{name}_{when}": value for name, value in asdict(self).items()}


def parameters_of(shape: LayerShape, groups: int, channels: int) -> int:
    """Parameters of a layer that keeps so many groups and channels."""
    removed = (shape.groups - groups) * shape.group_parameters
    return shape.parameters - removed - (shape.channels - channels) * shape.channel_parameters
