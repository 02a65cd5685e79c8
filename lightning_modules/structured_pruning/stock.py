"""Stock shapes: one number of groups and one width for all kept layers, so that the family's own class has the model.

Other code than Pare's (vLLM, llama.cpp's converter, TGI) reads such a model like any other of its family.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from lightning_modules.structured_pruning.budget import widths_of
from lightning_modules.structured_pruning.footprint import parameters_of
from lightning_modules.structured_pruning.importance.base import Keep
from lightning_modules.structured_pruning.layers import LayerShape, family
from lightning_modules.structured_pruning.plan import LayerPlan

CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def class_name(config: PretrainedConfig) -> str:
    """The family's own class, for messages."""
    name: str = CONFIGS[family(config)].__name__
    return name.replace("Config", "ForCausalLM")


def expressible(config: PretrainedConfig, groups: int, shape: LayerShape) -> bool:
    """Whether the family's class has models of so many groups; any width of the MLP will do.

    Llama's demands that query heads divide the hidden size. Qwen2's knows no width of a head: engines take the hidden
    size over the number of heads for it, so heads cannot go, unless the model has another width already. Of a model of
    a per-layer class, which has lost heads, that is known where no number of heads would fill the hidden size.

    Args:
        config: Of a model of the family, pruned before or not.
        groups: Key-value heads of every layer.
        shape: A layer of the model.
    """
    heads = groups * shape.n_rep
    hidden: int = config.hidden_size
    kind = family(config)
    if kind == "llama":
        return hidden % heads == 0
    if kind == "qwen2":
        filling = filling_groups(config, shape.n_rep, shape.head_dim)
        if config.model_type != kind:
            return filling in (None, groups)
        return filling in (None, groups) or shape.groups != filling
    return True


def filling_groups(config: PretrainedConfig, n_rep: int, head_dim: int) -> int | None:
    """Key-value heads whose query heads are as wide together as the hidden size; None where no number is."""
    groups, rest = divmod(config.hidden_size, n_rep * head_dim)
    return None if rest else groups


def possible_groups(config: PretrainedConfig, shapes: Sequence[LayerShape]) -> list[int]:
    """Numbers of groups, ascending, that all layers can keep and the family's class can express."""
    return [g for g in range(1, min(s.groups for s in shapes) + 1) if expressible(config, g, shapes[0])]


def uniform_parts(shapes: Sequence[LayerShape], groups: int, target: int, multiple: int) -> list[Keep]:
    """So many groups in every layer, and the one number of channels whose removal comes nearest to the target.

    Args:
        shapes: The kept layers.
        groups: Groups that each keeps.
        target: Parameters to remove from them.
        multiple: Kept channels are a multiple of it, or all.
    """
    most = min(s.channels for s in shapes)
    wanted = most - (target - removed_by(shapes, groups, most)) / sum(s.channel_parameters for s in shapes)
    channels = min(reversed(widths_of(most, multiple)), key=lambda width: abs(width - wanted))
    return [Keep(groups, channels)] * len(shapes)


def removed_by(shapes: Sequence[LayerShape], groups: int, channels: int) -> int:
    """Parameters that go when every one of these layers keeps so many groups and channels."""
    return sum(s.parameters - parameters_of(s, groups, channels) for s in shapes)


def in_reach(shapes: Sequence[LayerShape], groups: int, target: int, multiple: int) -> bool:
    """Whether channels can make up the remainder of a target, so many groups kept: within half a step of them."""
    (keep, *_) = uniform_parts(shapes, groups, target, multiple)
    step = multiple * sum(s.channel_parameters for s in shapes)
    return abs(removed_by(shapes, groups, keep.channels) - target) <= step / 2


def check_in_reach(shapes: Sequence[LayerShape], groups: Sequence[int], target: int, multiple: int) -> None:
    """Refuse a target that no width reaches with any of these numbers of groups.

    Raises:
        ValueError: The message says what can be removed.
    """
    if any(in_reach(shapes, g, target, multiple) for g in groups):
        return
    total, channels = sum(s.parameters for s in shapes), min(s.channels for s in shapes)
    narrowest = widths_of(channels, multiple)[0]
    most, least = removed_by(shapes, min(groups), narrowest), removed_by(shapes, max(groups), channels)
    several = f"a group or more ({', '.join(map(str, groups))})" if len(groups) > 1 else f"{groups[0]} groups"
    if target > most:
        raise ValueError(
            f"budget: {target:,} parameters cannot be removed: in a stock shape every layer keeps {several} and "
            f"{narrowest} channels or more, so at most {most:,} can go ({most / total:.1%} of these layers); drop "
            "more layers, or take more from attention"
        )
    raise ValueError(
        f"budget: {target:,} parameters are fewer than go at least ({least:,}) when every layer keeps {several}; "
        "remove more, or take less from attention"
    )


def groups_for_share(shapes: Sequence[LayerShape], share: float, target: int, multiple: int) -> int:
    """Groups that every layer keeps when attention gives this share of what is removed, as nearly as whole ones can.

    Args:
        shapes: The kept layers.
        share: Of the target.
        target: Parameters to remove from them.
        multiple: See ``uniform_parts``.
    """
    most = min(s.groups for s in shapes)
    one = sum(s.group_parameters for s in shapes)
    surplus = sum((s.groups - most) * s.group_parameters for s in shapes)
    gone = min(max(_nearest((share * target - surplus) / one), 0), most - 1)
    step = multiple * sum(s.channel_parameters for s in shapes)
    if gone and surplus + gone * one > target + step / 2:  # channels can only be taken away, not added
        gone -= 1
    return most - gone


def check_expressible(
    config: PretrainedConfig, shapes: Sequence[LayerShape], groups: int, share: float, target: int
) -> None:
    """Refuse a number of groups that the family's class has no model of.

    Args:
        config: See ``expressible``.
        shapes: The kept layers.
        groups: What ``groups_for_share`` says.
        share: That share.
        target: Parameters to remove from the layers.

    Raises:
        ValueError: The message names the nearest numbers that the class can express.
    """
    possible = check_class(config, shapes)
    if groups in possible:
        return
    wanted, most = groups, min(s.groups for s in shapes)
    near = [*[g for g in possible if g < wanted][-1:], *[g for g in possible if g > wanted][:1]]
    offers = ", ".join(f"{g} (attention_share {_share_of(shapes, g, target):.2f})" for g in near)
    raise ValueError(
        f"attention_share: {share:g} of what is to go leaves {wanted} of {most} key-value heads, which "
        f"{class_name(config)} cannot express; the nearest that it can: {offers}; or set shape: free"
    )


def check_plan(config: PretrainedConfig, shapes: Sequence[LayerShape], layers: Sequence[LayerPlan]) -> None:
    """Refuse a given plan that is no stock shape.

    Args:
        config: See ``expressible``.
        shapes: All layers.
        layers: What the plan keeps of each.

    Raises:
        ValueError: Its layers are unlike, or the family's class has no model of so many groups.
    """
    kept = {(len(layer.groups), len(layer.channels)) for layer in layers if not layer.dropped}
    remedy = f"which {class_name(config)} cannot express; set shape: free, or make another plan"
    if len(kept) > 1:
        raise ValueError(f"plan: its layers keep unlike numbers of groups and channels, {remedy}")
    (groups, _), *_ = kept
    if not expressible(config, groups, shapes[0]):
        raise ValueError(f"plan: its layers keep {groups} key-value heads, {remedy}")


def check_class(config: PretrainedConfig, shapes: Sequence[LayerShape]) -> list[int]:
    """Numbers of groups, see ``possible_groups``; refuses a model that has no stock shape at all.

    Raises:
        ValueError: No number of groups will do.
    """
    possible = possible_groups(config, shapes)
    if not possible:
        most = min(s.groups for s in shapes)
        raise ValueError(
            f"shape: {class_name(config)} can express no number of key-value heads up to {most}; set shape: free"
        )
    return possible


def group_step(shapes: Sequence[LayerShape], groups: int, dropped: int, share: float | None, decoder: int) -> str:
    """What a group in every layer is worth, and from which budget on the next one goes: no cliff without a word.

    Args:
        shapes: The kept layers.
        groups: Groups that each keeps.
        dropped: Parameters of dropped layers.
        share: Share of the rest of the target that attention gives; None where trials decided.
        decoder: Parameters of the whole decoder.
    """
    one, most = sum(s.group_parameters for s in shapes), min(s.groups for s in shapes)
    surplus = sum((s.groups - most) * s.group_parameters for s in shapes)
    gone = most - groups
    text = (
        f"a group of every layer is {one / decoder:.1%} of the decoder; {groups} of {most} are kept, and channels make "
        "up the rest"
    )
    if share is None:
        return f"{text}; trials decide anew at every budget"
    if share == 0 or groups == 1:
        return f"{text}; no other budget takes another"
    following = (((gone + 0.5) * one + surplus) / share + dropped) / decoder
    return f"{text}; the next goes from a budget of {following:.1%} on"


def _share_of(shapes: Sequence[LayerShape], groups: int, target: int) -> float:
    return sum((s.groups - groups) * s.group_parameters for s in shapes) / target


def _nearest(number: float) -> int:
    """The nearest whole number; halves go up, so that a budget says when."""
    return math.floor(number + 0.5)
