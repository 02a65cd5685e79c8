"""Which model a pruner belongs to: its architecture, and a sample of its weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_TENSORS, _VALUES = 32, 8  # sampled parameters, and values of each: enough to tell a fine-tuned model from its base
_HALVES = (torch.bfloat16, torch.float16)
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

    Weights count as equal when rounding to half precision, of one or both, explains the difference: a model that was
    looked at in float32 may be run, or have been saved, in bfloat16.
    """
    found = config_differences(then, model.config)
    if found:
        return found
    parameters = dict(model.named_parameters())
    missing = [name for name in then["weights"] if name not in parameters]
    if missing:
        return [f"it has no weight {missing[0]}"]
    here = {name: parameters[name] for name in then["weights"]}
    return _weight_differences(
        then["weights"], {name: _sample(p) for name, p in here.items() if p.is_floating_point() and not p.is_meta}
    )


def identity_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """As ``differences``, of two descriptions; weights that only one of them has say nothing."""
    found = [f"{f} is {now[f]}, not {then[f]}" for f in _FIELDS if now[f] != then[f]]
    return found or _weight_differences(then["weights"], now["weights"])


def _weight_differences(then: dict[str, list[float]], now: dict[str, list[float]]) -> list[str]:
    pairs = {name: (torch.tensor(then[name]), torch.tensor(now[name])) for name in then if name in now}
    if not pairs:
        return []
    expected, actual = (torch.cat([pair[side] for pair in pairs.values()]) for side in (0, 1))
    # what the values are says more than what they are held in: a bfloat16 model that is loaded as float32 is rounded
    rounded = {_rounded_to(expected), _rounded_to(actual)}
    tolerance = 0.0 if len(rounded) == 1 else max(torch.finfo(half).eps for half in rounded if half is not None)
    tiny = tolerance * 1e-3  # numbers below half precision's normal range lose relative accuracy
    others = {
        name: pair
        for name, pair in pairs.items()
        if pair[0].shape != pair[1].shape or not torch.allclose(pair[1], pair[0], rtol=tolerance, atol=tiny)
    }
    if not others:
        return []
    name, (expected, actual) = next(iter(others.items()))
    example = "other shapes"
    if expected.shape == actual.shape:
        worst = int((expected - actual).abs().argmax())
        example = f"{actual[worst]:.6g} is there, not {expected[worst]:.6g}"
    return [f"the values of {name} are others ({example}; {len(others)} of the {len(pairs)} weights looked at differ)"]


def _rounded_to(values: Tensor) -> torch.dtype | None:
    """The half precision that holds these values exactly; None where neither does."""
    return next((half for half in _HALVES if torch.equal(values.to(half).float(), values)), None)


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
