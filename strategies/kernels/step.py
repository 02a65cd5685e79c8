"""A step of codec arithmetic: one readable function, four ways to run it.

The reference is the specification of what it computes, the oracle of every other way to compute it, what runs in slabs
where nothing else does, and the source that ``torch.compile`` gets.

Shape legend: b blocks, B elements of a block.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

SLAB = 1 << 16  # elements processed at a time on CPU: a slab and its temporaries stay in a core's L2 cache
_MORE_GRAPHS = 64  # dynamo's limit is per function, and all codecs share the functions of their base class
# inductor's code for GPUs would fuse multiplications with additions and divide approximately
_EXACT: dict[str, Any] = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}

Backend = Literal["reference", "slabs", "compiled", "triton"]
Choice = Literal["auto", "reference", "slabs", "compiled", "triton"]
VARIABLE = "PARE_KERNELS"
Place = tuple[Tensor, Tensor, Tensor] | None
"""What random numbers are drawn from: position of the first element in the unit's gradient, and a key of two words;
int32 without dimensions."""
Reference = Callable[..., None]
"""A step, called as ``reference(place, *tensors)``: the tensors are ``[b, …]`` with one b, contiguous, the first
``[b, B]``; results are written into some of them."""
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


class Fast:
    """A step as compiled code or as a kernel; in slabs of its reference where that does not fit the tensors.

    Args:
        run: Called like ``reference``.
        reference: See ``Reference``.
        example: Tensors of the shapes and dtypes that ``run`` was made for (any b).
        name: For messages.
    """

    def __init__(self, run: Reference, reference: Reference, example: tuple[Tensor, ...], name: str) -> None:
        self.reference = reference
        self.name = name
        self._run: Reference | None = run
        self._signature = _signature(example)

    def __call__(self, place: Place, *tensors: Tensor) -> None:
        """Run on blocks of any number."""
        # a single block would be another graph, and so would tensors of inference mode
        fits = self._run is not None and _signature(tensors) == self._signature and tensors[0].shape[0] > 1
        if self._run is None or not fits or torch.is_inference_mode_enabled():
            self._in_slabs(place, tensors)
            return
        try:
            self._run(place, *tensors)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            # guards are checked before anything is written
            _log.warning(
                "%s runs in slabs from now on: compiled for other settings (%s)", self.name, _first_line(error)
            )
            self._run = None
            self._in_slabs(place, tensors)

    @property
    def in_use(self) -> bool:
        """Whether it still runs as it was made to."""
        return self._run is not None

    def _in_slabs(self, place: Place, tensors: tuple[Tensor, ...]) -> None:
        b, block = tensors[0].shape
        rows = max(1, SLAB // block) if tensors[0].device.type == "cpu" else b
        for first in range(0, b, rows):
            here = (place[0] + _word(first * block), *place[1:]) if place is not None else None
            self.reference(here, *(tensor[first : first + rows] for tensor in tensors))


def faster(
    reference: Reference,
    name: str,
    job: Job,
    example: tuple[Tensor, ...],
    place: Place = None,
    kernel: Reference | None = None,
    sums: bool = False,
) -> tuple[Reference, Backend]:
    """How to run a step on tensors shaped like ``example`` (any b), and what that is called.

    A faster way is adopted only if it repeats the reference on ``example``; otherwise the reason is logged and slabs of
    the reference remain, which the caller cuts.

    Args:
        reference: The step.
        name: For messages.
        job: What is asked for.
        example: Tensors with b ≥ 2; not changed.
        place: See ``Reference``.
        kernel: The step as a Triton kernel, if there is one; called like ``reference``.
        sums: The order of summation may change the last digits.
    """
    if job.backend in ("reference", "slabs"):
        return reference, job.backend
    chosen: Backend = "triton" if job.backend == "triton" and kernel is not None else "compiled"
    try:
        run = kernel if chosen == "triton" and kernel is not None else _compiled(reference, job.device)
        with torch.no_grad():
            wanted, got = ([tensor.clone() for tensor in example] for _ in range(2))
            reference(place, *wanted)
            run(place, *got)
        if not all(agree(a, b, sums) for a, b in zip(wanted, got, strict=True)):
            raise RuntimeError("its results differ from the reference's")
    except Exception as error:  # a compiler fails in too many ways to name, and training must go on
        _log.warning("%s runs in slabs, not %s: %s", name, chosen, _first_line(error))
        return reference, "slabs"
    return Fast(run, reference, example, name), chosen


def place_of(origin: tuple[int, int, int] | None, device: torch.device) -> Place:
    """Position and key as tensors: numbers would be constants, and every other value another graph."""
    if origin is None:
        return None
    # filled, not copied: a copy from the host would wait for the device
    first, one, two = (torch.full((), _word(number), dtype=torch.int32, device=device) for number in origin)
    return first, one, two


def _word(number: int) -> int:
    """``number`` as a signed 32-bit word."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


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


def _compiled(reference: Reference, device: torch.device) -> Reference:
    """The reference through ``torch.compile``: for any number of blocks, never compiled again."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()  # raises at once; later, a missing compiler is a hundred lines of log
    graph = torch.compile(reference, fullgraph=True, options=_EXACT if device.type == "cuda" else None)
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
