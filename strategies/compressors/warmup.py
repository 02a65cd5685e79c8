"""A schedule: uncompressed first, compressed later."""

from typing import Self

from torch import Tensor

from strategies.compressors.base import Compressor
from strategies.compressors.int4 import Int4
from strategies.compressors.none_a2a import NoCompressionA2A
from strategies.units import Unit


class WarmUp(Compressor):
    """Send fp32 for the first optimizer steps, then use ``inner``.

    Early gradients are large and change fast; 1-bit Adam (arXiv 2102.02888) and PowerSGD's torch hook start so. fp32
    travels through the codecs' all-to-all. Bytes sent: 4N(n−1)/n for ``steps`` steps, then those of ``inner``.

    Args:
        inner: The method from then on.
        steps: Optimizer steps without compression.
    """

    def __init__(self, inner: Compressor, steps: int = 100) -> None:
        if steps < 0:
            raise ValueError(f"WarmUp.steps must be 0 or more, got {steps}")
        self.inner, self.steps = inner, steps
        self.unbiased, self.contractive, self.linear = inner.unbiased, inner.contractive, inner.linear
        self.sparsifier, self.stateful = inner.sparsifier, inner.stateful
        self._dense = NoCompressionA2A()

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``: before and after the switch."""
        return [cls(Int4(), 1), cls(Int4(), 0)]

    def for_feedback(self) -> Compressor:
        """Itself around the inner method's form."""
        return type(self)(self.inner.for_feedback(), self.steps)

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        self._now(unit).reduce_scatter(grad, output, unit, sent)

    def all_reduce(self, grad: Tensor, unit: Unit) -> None:
        """See ``Compressor.all_reduce``; the way back is the inner method's, too."""
        self._now(unit).all_reduce(grad, unit)

    def _now(self, unit: Unit) -> Compressor:
        return self._dense if unit.step < self.steps else self.inner
