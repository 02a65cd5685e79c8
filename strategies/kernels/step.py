"""A step of codec arithmetic: one readable function, four ways to run it.

The function decorated with ``@step`` is the specification of what it computes, the oracle of every other way to compute
it, what runs in slabs where nothing else does, and the source that ``torch.compile`` gets.

Shape legend: b blocks, B elements of a block.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

SLAB = 1 << 16  # elements processed at a time on CPU: a slab and its temporaries stay in a core's L2 cache
_MORE_GRAPHS = 64  # dynamo's limit is per function, and all codecs share the functions of their base class

Backend = Literal["reference", "slabs", "compiled", "triton"]
Choice = Literal["auto", "reference", "slabs", "compiled", "triton"]
VARIABLE = "PARE_KERNELS"
Place = tuple[Tensor, Tensor, Tensor] | None
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a warm-up prepares for.

    Attributes:
        backend: How steps should run: "reference" (whole tensors), "slabs", "compiled", or "triton" (compiled where
            there is no Triton kernel).
        device: Where gradients are.
        ranks: Ranks that share a gradient: payloads that are averaged at once.
        dtype: Of the gradients.
    """

    backend: Backend
    device: torch.device
    ranks: int
    dtype: torch.dtype = torch.float32


def choose(choice: Choice, device: torch.device) -> Backend:
    """The backend that ``choice`` means; "auto" is ``PARE_KERNELS`` where that is set.

    Else slabs on a CPU, where compiling takes 10 to 25 s of a first start and short runs never earn that back, and
    compiled code on a GPU, where the reference makes a pass over memory for every operation.

    Raises:
        ValueError: The environment variable holds no backend.
    """
    if choice != "auto":
        return choice
    wanted = os.environ.get(VARIABLE, "")
    if not wanted:
        return "slabs" if device.type == "cpu" else "compiled"
    for backend in get_args(Backend):
        if wanted == backend:
            return backend
    raise ValueError(f"{VARIABLE}={wanted}: must be one of {', '.join(get_args(Backend))}, or not be set")


class Step:
    """One piece of arithmetic on blocks, as one instance of a codec runs it.

    Args:
        reference: Called as ``reference(place, *tensors)``. The tensors are ``[b, …]`` with one b, contiguous, the
            first ``[b, B]``; results are written into some of them. ``place`` is what random numbers are drawn from:
            position of the first element and a key of two words, int32 without dimensions; or None.
        name: For messages.
    """

    def __init__(self, reference: Callable[..., None], name: str) -> None:
        self.reference = reference
        self.name = name
        self.backend: Backend | None = None  # what a warm-up settled on
        self._fast: dict[tuple, Callable[..., None]] = {}
        self._whole = False

    def __call__(self, origin: tuple[int, int, int] | None, *tensors: Tensor) -> None:
        """Run on blocks of any number.

        Args:
            origin: Position of the first element in the unit's gradient, and the key; None when nothing is drawn.
            tensors: See ``reference``.
        """
        fast = self._fast.get(_signature(tensors)) if self._fast else None
        # a single block would be another graph, and so would tensors of inference mode
        if fast is None or tensors[0].shape[0] == 1 or torch.is_inference_mode_enabled():
            self._in_slabs(origin, tensors)
            return
        try:
            fast(place_of(origin, tensors[0].device), *tensors)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            # guards are checked before anything is written
            _log.warning(
                "%s runs in slabs from now on: compiled for other settings (%s)", self.name, _first_line(error)
            )
            self._fast.clear()
            self.backend = "slabs"
            self._in_slabs(origin, tensors)

    def _in_slabs(self, origin: tuple[int, int, int] | None, tensors: tuple[Tensor, ...]) -> None:
        """The reference, a cache-sized slab at a time on CPU; a GPU wants one launch."""
        b, block = tensors[0].shape
        rows = max(1, SLAB // block)
        if self._whole or b <= rows or tensors[0].device.type != "cpu":
            self.reference(place_of(origin, tensors[0].device), *tensors)
            return
        for first in range(0, b, rows):
            here = (origin[0] + first * block, *origin[1:]) if origin is not None else None
            self.reference(place_of(here, tensors[0].device), *(t[first : first + rows] for t in tensors))

    def warm(
        self,
        job: Job,
        example: tuple[Tensor, ...],
        origin: tuple[int, int, int] | None = None,
        kernel: Callable[..., None] | None = None,
        sums: bool = False,
    ) -> None:
        """Settle how to run on tensors shaped like ``example`` (any b), before it is needed.

        A faster way is adopted only if it repeats the reference on ``example``; otherwise the reason is logged and
        slabs remain.

        Args:
            job: What is asked for.
            example: Tensors as in ``__call__``, with b ≥ 2; not changed.
            origin: See ``__call__``.
            kernel: The step as a Triton kernel, if there is one; called like ``reference``.
            sums: The order of summation may change the last digits.
        """
        if job.backend in ("reference", "slabs"):
            self._whole, self.backend = job.backend == "reference", job.backend
            return
        chosen: Backend = "triton" if job.backend == "triton" and kernel is not None else "compiled"
        try:
            fast = kernel if chosen == "triton" and kernel is not None else _compiled(self.reference, job.device)
            with torch.no_grad():
                wanted, got = ([tensor.clone() for tensor in example] for _ in range(2))
                place = place_of(origin, job.device)
                self.reference(place, *wanted)
                fast(place, *got)
            if not all(agree(a, b, sums) for a, b in zip(wanted, got, strict=True)):
                raise RuntimeError("its results differ from the reference's")
        except Exception as error:  # a compiler fails in too many ways to name, and training must go on
            _log.warning("%s runs in slabs, not %s: %s", self.name, chosen, _first_line(error))
            self.backend = "slabs"
            return
        self._fast[_signature(example)] = fast
        self.backend = chosen


def step(function: Callable[..., None]) -> Any:
    """Make a method of a codec a ``Step``; every instance has its own."""
    return functools.cached_property(lambda codec: Step(function.__get__(codec), f"{codec!r}.{function.__name__}"))


def place_of(origin: tuple[int, int, int] | None, device: torch.device) -> Place:
    """Position and key as tensors: numbers would be constants, and every other value another graph."""
    if origin is None:
        return None
    first, one, two = (
        # filled, not copied: a copy from the host would wait for the device
        torch.full((), (word + (1 << 31)) % (1 << 32) - (1 << 31), dtype=torch.int32, device=device)
        for word in origin
    )
    return first, one, two


def agree(wanted: Tensor, got: Tensor, sums: bool) -> bool:
    """Whether results are the same: bit by bit, or up to the order of summation.

    With ``sums``, one element in a thousand may differ: statistics in their last digit can round a neighbour's code to
    the other side.
    """
    if not sums or not wanted.numel():
        return torch.equal(wanted, got)
    exact, other = wanted.double(), got.double()
    far = (exact - other).abs() > (1e-5 * exact.abs().max() if wanted.is_floating_point() else 0)
    return far.float().mean().item() <= 1e-3


def _signature(tensors: tuple[Tensor, ...]) -> tuple:
    return tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors)


def _compiled(reference: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """The reference through ``torch.compile``: for any number of blocks, never compiled again."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()  # raises at once; later, a missing compiler is a hundred lines of log
    graph = torch.compile(reference, fullgraph=True)
    ready = False

    def run(place: Place, *tensors: Tensor) -> None:
        nonlocal ready
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # both are part of what was compiled
            if ready:
                with torch.compiler.set_stance("fail_on_recompile"):
                    graph(place, *tensors)
                return
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
            with torch._dynamo.config.patch(recompile_limit=_MORE_GRAPHS):
                graph(place, *tensors)
            ready = True

    return run


def _first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # what the compiler itself stumbled over
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
