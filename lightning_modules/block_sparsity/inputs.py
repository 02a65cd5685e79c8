"""What calibration text gives to matrices, while it goes through a decoder layer.

Shape legend: C inputs of a matrix; n tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.stream import LayerInputs


@dataclass
class _Factors:
    """Of M damped by some share: the diagonal of M⁻¹, float64 ``[C]``; M⁻¹ itself, until its factor is there."""

    diagonal: Tensor
    inverse: Tensor | None
    upper: Tensor | None = None


class Moments:
    """M = Σ x xᵀ and what is computed of it: once, for all matrices that share their inputs, and all that ask.

    Args:
        total: M, float32 ``[C, C]``; must not change any more once something is computed of it.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total
        self._factors: dict[float, _Factors] = {}

    def damped(self, share: float) -> Tensor:
        """M with so much of its mean diagonal added to the diagonal, float64, freshly made.

        Raises:
            ValueError: M is not finite.
        """
        found = self.total.to(torch.float64, copy=True)
        found.diagonal().add_(share * found.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
        if not found.isfinite().all():
            raise ValueError("the calibration statistics have NaN or Inf")
        return found

    def inverse_diagonal(self, share: float) -> Tensor:
        """[M⁻¹]_cc of M damped so, float64 ``[C]``.

        Raises:
            ValueError: M is not finite.
            torch.linalg.LinAlgError: M is singular all the same.
        """
        return self._factored(share).diagonal

    def inverse_upper(self, share: float) -> Tensor:
        """U with M⁻¹ = UᵀU of M damped so, float32 ``[C, C]``. Raises what ``inverse_diagonal`` does."""
        known = self._factored(share)
        if known.upper is None:
            known.upper = torch.linalg.cholesky(known.inverse, upper=True).float()
            known.inverse = None  # twice as large, and nobody asks for it
        return known.upper

    def _factored(self, share: float) -> _Factors:
        if share not in self._factors:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped(share)))
            self._factors[share] = _Factors(inverse.diagonal().clone(), inverse)
        return self._factors[share]


class Inputs:
    """Sums over the calibration tokens that a matrix was given, x ``[C]``; padding does not count.

    Args:
        columns: C.
        device: Where to add up.
        moments: Whether Σ x xᵀ is wanted, too.

    Attributes:
        tokens: How many.
        squares: Σ x², float32 ``[C]``.
    """

    def __init__(self, columns: int, device: torch.device, moments: bool) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, device=device)
        self._moments = Moments(torch.zeros(columns, columns, device=device)) if moments else None

    @property
    def moments(self) -> Moments:
        """Σ x xᵀ."""
        assert self._moments is not None, "moments were not asked for"
        return self._moments

    def add(self, x_nC: Tensor) -> None:
        """Count some tokens."""
        x = x_nC.float()
        self.tokens += len(x)
        self.squares += x.pow(2).sum(0)
        if self._moments is not None:
            self._moments.total.addmm_(x.T, x)


@contextmanager
def collecting(
    matrices: Mapping[str, nn.Linear], stream: LayerInputs, moments: bool = False
) -> Iterator[dict[str, Inputs]]:
    """Add up what matrices are given for as long as the block lasts.

    Matrices that are given the very same tensor, such as those of queries, keys and values, share one sum.

    Args:
        matrices: Linear layers by name.
        stream: What goes through them.
        moments: See ``Inputs``.

    Yields:
        Sums by name; of no tokens where a matrix is given none, as an expert may be.

    Raises:
        ValueError: None of the matrices was given anything.
    """
    found = {name: Inputs(m.in_features, m.weight.device, moments=False) for name, m in matrices.items()}
    owner: dict[str, str] = {}  # whose sum it shares
    last: tuple[Tensor | None, str] = (None, "")

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def count(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            same = args[0] is last[0]
            if name not in owner:
                owner[name] = owner[last[1]] if same else name
                if owner[name] == name:
                    found[name] = Inputs(args[0].shape[-1], args[0].device, moments)
            found[name] = found[owner[name]]
            if not (same and owner[name] == owner[last[1]]):
                found[name].add(stream.on_tokens(args[0]))
            last = (args[0], name)

        return count

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in matrices.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if matrices and not owner:
        raise ValueError(
            f"{next(iter(matrices))} and all others of its layer were given no calibration text; a layer that is "
            "compiled is passed through without being watched"
        )
