"""Which modules of a model become units of communication."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from strategies.units import mixed

# hold modules or parameters, and are never called themselves
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def chosen_blocks(model: nn.Module, asked: Collection[type[nn.Module]] | None) -> set[type[nn.Module]]:
    """The classes that become units of their own: those asked for, else those found.

    Warns when there are none, since everything is gathered at once then.

    Raises:
        ValueError: A class that was asked for is not in the model.
    """
    blocks = set(asked) if asked is not None else find_blocks(model)
    missing = blocks - {type(m) for m in model.modules()}
    if missing:
        raise ValueError(
            f"auto_wrap_policy: the model has no {', '.join(sorted(cls.__name__ for cls in missing))}; it is made of "
            + ", ".join(sorted({type(m).__name__ for m in model.modules() if _any(m.children())}))
        )
    if not blocks:
        rank_zero_warn(
            "no repeated blocks found in the model: all of it is one unit, whose parameters are gathered at once. Name "
            "the classes of its blocks: auto_wrap_policy={Block}"
        )
    return blocks


def find_blocks(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of a model's repeated blocks: the natural units.

    A Hugging Face model declares its own (``_no_split_modules``). In any other, blocks are what a ``ModuleList``,
    ``ModuleDict`` or ``Sequential`` holds at least twice and is made of layers itself; lists inside of blocks do not
    count.

    Returns:
        The classes; empty when there are none.
    """
    names = {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    declared = {type(m) for m in model.modules() if type(m).__name__ in names}
    return declared or _repeated(model)


def _repeated(module: nn.Module) -> set[type[nn.Module]]:
    if isinstance(module, (*_CONTAINERS, nn.Sequential)):
        made_of_layers = Counter(type(m) for m in module.children() if _any(m.children()) and _any(m.parameters()))
        if blocks := {cls for cls, count in made_of_layers.items() if count > 1}:
            return blocks
    return {cls for child in module.children() for cls in _repeated(child)}


def trained_apart(model: nn.Module, blocks: set[type[nn.Module]]) -> list[nn.Module]:
    """Modules to wrap besides ``blocks``, so that no unit holds both trained and frozen parameters.

    FSDP1 reduces the gradient of a whole unit, zeros for frozen parameters included. These are the largest modules
    inside a mixed unit all of whose parameters are trained, such as adapters or a new head.

    Raises:
        ValueError: A trained parameter cannot be kept apart: it belongs directly to a module that holds frozen ones,
            or is shared with another module.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    apart: list[nn.Module] = []
    for unit in [model, *(m for m in model.modules() if type(m) in blocks)]:
        own = list(_parameters(unit, blocks))
        if {p.requires_grad for p in own} == {True, False}:
            found = list(_wholly_trained(unit, blocks))
            covered = Counter(id(p) for module in found for p in _parameters(module, blocks))
            every = Counter(id(p) for p in _parameters(model))
            for p in own:
                if p.requires_grad and (id(p) not in covered or every[id(p)] != covered[id(p)]):
                    raise mixed(names[id(p)])
            apart += found
    return apart


def _wholly_trained(module: nn.Module, blocks: set[type[nn.Module]]) -> Iterator[nn.Module]:
    for child in module.children():
        trained = {p.requires_grad for p in _parameters(child, blocks)} if type(child) not in blocks else set()
        if trained == {True} and not isinstance(child, _CONTAINERS):
            yield child
        elif True in trained:
            yield from _wholly_trained(child, blocks)


def _parameters(module: nn.Module, blocks: Collection[type[nn.Module]] = ()) -> Iterator[nn.Parameter]:
    """Parameters of ``module`` outside of the blocks in it; shared ones as often as they occur."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if type(child) not in blocks:
            yield from _parameters(child, blocks)


def _any(found: Iterable[object]) -> bool:
    """Whether there is one: an empty container module, or a tensor, is not true or false itself."""
    return any(True for _ in found)
