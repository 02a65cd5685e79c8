"""Building a model of which a rank keeps its own rows alone, while its constructor believes that it is whole.

Whoever builds a model on every rank and shards it afterwards needs memory for all of it first. Here each parameter
becomes a tensor without memory ("meta") as soon as a module gets it. What is done to it in place, as initialisation
does, is done to a whole tensor of its own for that moment, of which this rank's rows are kept. Random numbers are drawn
as ever, so the weights are those of an ordinary start, bit for bit. What is read from disk is read one parameter at a
time. At most one parameter is whole at once.

Rows are those of FSDP2: dimension 0 in as many equal pieces as there are ranks, the last ones shorter or empty.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# in place, every element by itself
_ELEMENTWISE = {
    *("fill_", "zero_", "mul_", "add_", "sub_", "div_", "neg_", "abs_", "pow_", "sqrt_", "erfinv_"),
    *("clamp_", "clamp_min_", "clamp_max_", "exp_", "log_", "reciprocal_"),
}
# in place, whatever was there before
_RANDOM = {
    *("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"),
}


@dataclass
class _Rows:
    """What a rank keeps of a parameter."""

    shape: torch.Size
    first: int
    rows: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor of the parameter's shape."""
        return whole[self.first : self.first + self.rows.shape[0]]


class ShardedStart(TorchDispatchMode):
    """While it is entered, and a model built, parameters on the CPU keep this rank's rows.

    Args:
        rank: This rank's place among those that share a parameter.
        ranks: How many there are.

    Raises:
        ValueError: Parameters are given values in a way that needs all of them.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self._kept: dict[tuple[nn.Module, str], _Rows] = {}
        self._stored: dict[int, _Rows] = {}  # by the storage of the parameter, which holds nothing
        self._alive: list[Tensor] = []  # so that no other storage gets such a number

    @contextmanager
    def building(self) -> Iterator[None]:
        """Build the model within."""
        register = nn.Module.register_parameter

        def taken(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if type(param) is nn.Parameter and param.dim() > 0:
                if param.device.type == "cpu":
                    param = self._keep(param)
                if (rows := self._of(param)) is not None:
                    self._kept[module, name] = rows
            register(module, name, param)

        # transformers' threads would read whole weights faster than they are cut
        one_by_one = mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})
        with mock.patch.object(nn.Module, "register_parameter", taken), one_by_one, self._initialising(), self:
            yield
        self._alive.clear()

    @contextmanager
    def _initialising(self) -> Iterator[None]:
        """Let ``torch.nn.init`` have whole tensors; some of its functions leave those without memory as they are."""

        def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def on_whole(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                kept = self._of(tensor)
                if kept is None or tensor.shape != kept.shape:
                    return function(tensor, *args, **kwargs)
                drawn = torch.empty(kept.shape, dtype=kept.rows.dtype)
                function(drawn, *args, **kwargs)
                kept.rows.copy_(kept.of(drawn))
                return tensor

            return on_whole

        found = {name: wrapped(value) for name, value in vars(nn.init).items() if _initialises(name, value)}
        with ExitStack() as patched:
            patched.enter_context(mock.patch.dict(vars(nn.init), found))
            if (known := sys.modules.get("transformers.initialization")) is not None:  # has its own references
                own: dict[str, Any] = known.TORCH_INIT_FUNCTIONS
                patched.enter_context(mock.patch.dict(own, {name: f for name, f in found.items() if name in own}))
            yield

    def _of(self, tensor: Any) -> _Rows | None:
        """What is kept of a parameter; None for any other tensor."""
        known = isinstance(tensor, Tensor) and tensor.device.type == "meta"
        return self._stored.get(_storage(tensor)) if known else None

    def _keep(self, whole: nn.Parameter) -> nn.Parameter:
        size = -(-whole.shape[0] // self.ranks)
        first = min(self.rank * size, whole.shape[0])
        empty = nn.Parameter(torch.empty_like(whole, device="meta"), requires_grad=whole.requires_grad)
        vars(empty).update(vars(whole))  # transformers marks what it has read
        rows = whole.detach()[first : first + size].clone()
        self._stored[_storage(empty)] = _Rows(whole.shape, first, rows)
        self._alive.append(empty)
        return empty

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do to a parameter's rows what is done to it in place."""
        kwargs = kwargs or {}
        target = args[0] if args else None
        kept = self._of(target) if func._schema.is_mutable else None
        if target is None or kept is None:
            try:
                return func(*args, **kwargs)
            except NotImplementedError as error:
                if not any(self._of(each) is not None for each in args):
                    raise
                raise ValueError(
                    "values of a parameter are read while the model is built, when each rank has its rows alone: build "
                    "it whole (--trainer.strategy.start whole)"
                ) from error
        name = func._schema.name.removeprefix("aten::")
        rest = args[1:]
        if target.shape == kept.shape and target.is_contiguous():
            done = self._whole(func, name, kept, rest, kwargs)
        else:
            done = self._row(func, name, kept, target, rest, kwargs)
        if not done:
            raise ValueError(
                f"a parameter of shape {tuple(kept.shape)} is given its values by {name}, which needs all of it: build "
                "the model whole (--trainer.strategy.start whole)"
            )
        return target

    def _whole(self, func: Any, name: str, kept: _Rows, rest: Any, kwargs: Any) -> bool:
        if name in _RANDOM:
            drawn = torch.empty(kept.shape, dtype=kept.rows.dtype)
            func(drawn, *rest, **kwargs)
            kept.rows.copy_(kept.of(drawn))
        elif name == "copy_":
            source = rest[0]
            other = self._of(source)
            if source.device.type == "meta" and (other is None or source.shape != kept.shape):
                return False
            kept.rows.copy_(other.rows if other is not None else kept.of(source.expand(kept.shape)))
        elif name in _ELEMENTWISE and all(not isinstance(each, Tensor) or not each.dim() for each in rest):
            func(kept.rows, *rest, **kwargs)
        else:
            return False
        return True

    def _row(self, func: Any, name: str, kept: _Rows, view: Tensor, rest: Any, kwargs: Any) -> bool:
        """One row of a parameter, as that of padding; False where it is another part."""
        if view.shape != kept.shape[1:] or not view.is_contiguous() or name not in {"fill_", "zero_"}:
            return False
        row, beside = divmod(int(view.storage_offset()), max(view.numel(), 1))
        if beside:
            return False
        if 0 <= row - kept.first < kept.rows.shape[0]:
            func(kept.rows[row - kept.first], *rest, **kwargs)
        return True

    # Afterwards.

    def fill_shards(self, model: nn.Module, device: torch.device) -> None:
        """Give the shards of a model that FSDP2 has sharded their memory and their values.

        Raises:
            ValueError: The module has sharded it in another way.
        """
        if not self._kept:
            return
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
        model.to_empty(device=device)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    kept = self._kept.get((module, name))
                    own = parameter.to_local() if isinstance(parameter, DTensor) else None
                    if kept is None or own is None or own.shape != kept.rows.shape:
                        raise ValueError(
                            f"{type(module).__name__}.{name} has no values: it was made or sharded in a way of its "
                            "own; build the model whole (--trainer.strategy.start whole)"
                        )
                    own.copy_(kept.rows)
        self.forget()

    def fill_whole(self, device: torch.device, group: dist.ProcessGroup | None) -> Callable[[nn.Module], None]:
        """What gives a module's own parameters, whole, to FSDP1, which then cuts them: ranks gather their rows.

        A parameter that several modules share is the same for all of them.
        """
        made: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()  # until FSDP1 has cut it, and no longer

        def fill(module: nn.Module) -> None:
            for name, empty in list(module.named_parameters(recurse=False)):
                if empty.device.type != "meta":
                    continue
                if id(empty) not in made:
                    kept = self._kept[module, name]
                    whole = nn.Parameter(_gathered(kept, self.ranks, group, device), empty.requires_grad)
                    made[id(empty)] = whole
                nn.Module.register_parameter(module, name, made[id(empty)])

        return fill

    def forget(self) -> None:
        """Free what was kept: the model has it."""
        self._kept.clear()
        self._stored.clear()

    @property
    def held(self) -> int:
        """Bytes of the rows that are kept."""
        return sum(rows.rows.nbytes for rows in self._stored.values())


def _gathered(kept: _Rows, ranks: int, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """The whole parameter on ``device``, which is where the group's backend can send from."""
    size = -(-kept.shape[0] // ranks)
    own = torch.zeros(size, *kept.shape[1:], dtype=kept.rows.dtype, device=device)
    own[: kept.rows.shape[0]] = kept.rows
    every = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(every, own, group=group)
    return torch.cat(every)[: kept.shape[0]]


def _initialises(name: str, value: Any) -> bool:
    return name.endswith("_") and not name.endswith("__") and inspect.isfunction(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
