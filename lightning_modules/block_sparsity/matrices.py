"""The matrices of a model that are pruned."""

from torch import nn

from lightning_modules.stream import decoder_layers


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer inside the decoder layers, by its name in the model: what is pruned.

    Raises:
        ValueError: There is none, as in GPT-2, whose layers are transposed convolutions.
    """
    found = {
        f"{layer_name}.{name}": module
        for layer_name, layer in decoder_layers(model).items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear in its decoder layers: block sparsity needs an architecture such "
            "as llama or qwen2"
        )
    return found
