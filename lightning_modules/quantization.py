"""Weights in fewer bits after pruning, by torchao (the extra ``quant``); no quantiser is Pare's own.

Only the linear layers of the decoder change. Embeddings and head stay as they are: they are often one tensor, which a
quantised head would make two.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn

Format = Literal["int8", "int4"]
"""Bits of a weight. int8: symmetric, a scale for every row. int4: groups of 32 weights of a row, each with scale and
zero."""

_GROUP = 32
_DECODER = "layers."


def check_available() -> None:
    """Refuse where torchao is not installed.

    Raises:
        ValueError: It is not.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("quantization needs the package torchao: pip install -e '.[quant]'")


def quantize(model: Any, format: Format) -> None:
    """Quantise the decoder's linear layers in place, on the device that they are on; activations stay as they are.

    On a CPU, int4 takes torchao's packing for PyTorch's CPU kernel (a prototype of torchao's), on CUDA its tile-packed
    one, which needs bfloat16.

    Args:
        model: A ``PreTrainedModel``.
        format: See ``Format``.

    Raises:
        ValueError: torchao is not there, most weights are not of linear layers, a width is no multiple of the
            group, or a kernel does not take the dtype.
    """
    check_available()
    _check_linear(model, format)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    device = next(model.parameters()).device.type
    if format == "int4":
        _check_groups(model)
        if device == "cuda" and model.dtype != torch.bfloat16:
            raise ValueError(f"int4 on CUDA needs dtype bfloat16, the model is in {model.dtype}")
    config: Any
    if format == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif device == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False)
    else:
        from torchao.quantization import Int4WeightOnlyConfig

        packing: Any = "tile_packed_to_4d"
        config = Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format=packing, set_inductor_config=False)
    quantize_(model, config, filter_fn=_in_decoder)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are held: codes, scales and zeros of quantised ones; tied ones once."""
    parts: dict[int, int] = {}
    for weight in model.parameters():
        for part in _plain_parts(weight.data if type(weight) is nn.Parameter else weight):
            parts[part.data_ptr()] = part.numel() * part.itemsize
    return sum(parts.values())


def _in_decoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and _DECODER in name


def _check_linear(model: nn.Module, format: str) -> None:
    """Refuse models of which more would stay as it is: GPT-2's own layers, experts in one parameter."""
    linear = [module.weight for name, module in model.named_modules() if _in_decoder(module, name)]
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    known = {id(weight) for weight in (*linear, *embeddings, head)}
    left = {name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in known}
    if sum(p.numel() for p in left.values()) >= sum(weight.numel() for weight in linear):
        largest = max(left, key=lambda name: left[name].numel(), default="nothing")
        raise ValueError(
            f"{format}: {type(model).__name__} has most of its weights outside of torch.nn.Linear in decoder layers "
            f"({largest}), where they would stay as they are; leave quantization out"
        )


def _check_groups(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _in_decoder(module, name) and (width := module.weight.shape[1]) % _GROUP:
            raise ValueError(
                f"int4: {name} is {width} wide, no multiple of the {_GROUP} weights that share a scale; prune with "
                f"channel_multiple {_GROUP}, or take int8"
            )


def _plain_parts(weight: Any) -> list[Tensor]:
    """Tensors that a weight is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(weight, name))]
