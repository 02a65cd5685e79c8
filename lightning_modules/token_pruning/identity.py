"""Which model a pruner belongs to: its architecture, and a sample of its weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_TENSORS, _VALUES = 32, 8  # sampled parameters, and values of each: enough to tell a fine-tuned model from its base
_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def identity_of(model: PreTrainedModel) -> dict[str, Any]:
    """Architecture and weights sample of a model, as JSON-able values.

    Returns:
        ``model_type``, ``hidden_size``, ``num_hidden_layers``, ``vocab_size``, ``dtype`` and ``weights``: evenly spaced
        values of evenly spaced parameters, by the parameter's name. Weights on the meta device (offloaded) are left
        out.
    """
    config = model.config.get_text_config()
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    chosen = [named[i] for i in _spread(len(named), _TENSORS)]
    return {
        **{field: getattr(config, field) for field in _FIELDS},
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": {name: _sample(p) for name, p in chosen},
    }


def differences(then: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """What tells ``model`` from the one described by ``then``; empty when it is the same.

    Weights count as equal when rounding to the coarser of both precisions explains the difference: a model trained
    against in float32 may be run in bfloat16.
    """
    found = config_differences(then, model.config)
    if found:
        return found
    now = identity_of(model)
    dtypes = {then["dtype"], now["dtype"]}
    # equal precisions must agree exactly; otherwise one of them has been rounded to the other
    tolerance = 0.0 if len(dtypes) == 1 else max(torch.finfo(getattr(torch, name)).eps for name in dtypes)
    parameters = dict(model.named_parameters())
    for name, values in then["weights"].items():
        if name not in parameters:
            return [f"it has no weight {name}"]
        parameter = parameters[name]
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        expected, actual = torch.tensor(values), torch.tensor(_sample(parameter))
        tiny = tolerance * 1e-3  # numbers below half precision's normal range lose relative accuracy
        if expected.shape != actual.shape or not torch.allclose(actual, expected, rtol=tolerance, atol=tiny):
            return [f"the values of {name} are others"]
    return []


def config_differences(then: dict[str, Any], config: PretrainedConfig) -> list[str]:
    """What tells a model with this configuration from the one described by ``then``; weights are not looked at."""
    now = config.get_text_config()
    return [f"{f} is {getattr(now, f, None)}, not {then[f]}" for f in _FIELDS if getattr(now, f, None) != then[f]]


def _sample(parameter: nn.Parameter) -> list[float]:
    flat: Tensor = parameter.detach().flatten()
    index = torch.tensor(_spread(flat.numel(), _VALUES), device=flat.device)
    return flat[index].float().tolist()


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices below ``length``, evenly spaced, ends included."""
    count = min(length, count)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]
