"""Error feedback: what compression held back is added to the next gradient."""

import logging
from typing import Self

import torch
from torch import Tensor

from strategies import residuals
from strategies.compressors.base import Compressor, Use
from strategies.compressors.blocks import BlockCodec
from strategies.compressors.int8 import Int8
from strategies.compressors.onebit import OneBit
from strategies.compressors.topk import TopK
from strategies.kernels import Job
from strategies.units import Unit

_log = logging.getLogger(__name__)


class ErrorFeedback(Compressor):
    """Send C(g + e) and keep e ← g + e − what the owners understood, around any contractive method C.

    Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847. Nothing is lost, only late: the sum of what
    was sent plus the residual is the sum of the gradients. The residual is taken over the whole pipeline (selection,
    quantisation, packing), is zero on padding, and is kept per unit and rank, also in checkpoints.

    The theory wants a contraction. Methods that are none are replaced by their contractive form where there is one
    (scaled random-k by unscaled, QSGD and TernGrad by themselves × 1/(1+ω), stochastic rounding by nearest), and
    refused otherwise. It also wants a small step: η·L ≲ δ. Wire and bytes: those of ``inner``.

    A NaN or Inf still reaches the owner, where ``GradientGuard`` sees it; where it struck, the residual stays as it
    was.

    Args:
        inner: The method to wrap.
        storage: How the residual is kept between steps: "float32" (exact; 4 bytes an element of the whole unit on every
            rank), "bfloat16" or "int8" (one scale per 256; both lose what they round away).

    Raises:
        ValueError: ``inner`` has error feedback already, or no contractive form.
    """

    stateful = owes = True

    def __init__(self, inner: Compressor, storage: residuals.Storage = "float32") -> None:
        if any(keeps_residual(method) for method in inner.within()):
            raise ValueError(
                f"ErrorFeedback(inner={inner!r}): the inner method keeps its own residual; a second one would send the "
                "same error twice. Use one of them."
            )
        if storage not in ("float32", "bfloat16", "int8"):
            raise ValueError(f"ErrorFeedback.storage must be float32, bfloat16 or int8; got {storage!r}")
        self.inner, self.storage = inner.for_feedback(), storage
        if repr(self.inner) != repr(inner):
            _log.info("ErrorFeedback: %r is not contractive; %r takes its place", inner, self.inner)
        self.linear = False
        self.sparsifier = inner.sparsifier

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(Int8()), cls(OneBit()), cls(TopK(0.1, values=Int8())), cls(OneBit(), "bfloat16")]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``."""
        return self.inner.warm_up(job, "owing")

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``; in one pass where the inner method can and nobody asks for ``sent``."""
        with unit.traffic.timed(unit.name, "encode", grad.device):
            owed = residuals.load(unit, "residual", grad.numel(), grad.device)
        fused = isinstance(self.inner, BlockCodec) and self.inner.fuses and not unit.traffic.sampling
        if isinstance(self.inner, BlockCodec) and fused and sent is None:
            self.inner.reduce_scatter_owing(grad, owed, output, unit)
            left = owed
        else:
            left = self._apart(grad, owed, output, unit, sent)
        with unit.traffic.timed(unit.name, "encode", grad.device):
            unit.clear_padding(left, 0)
            residuals.store(unit, "residual", left, self.storage)

    def _apart(self, grad: Tensor, owed: Tensor, output: Tensor, unit: Unit, sent: Tensor | None) -> Tensor:
        """Reduce ``grad + owed`` by any method; what was not understood of it."""
        with unit.traffic.timed(unit.name, "encode", grad.device):
            corrected = grad.float() + owed
        sent = torch.empty_like(corrected) if sent is None else sent
        self.inner.reduce_scatter(corrected, output, unit, sent)
        with unit.traffic.timed(unit.name, "encode", grad.device):
            residuals.settle(corrected.sub_(sent), owed)
        return owed


def keeps_residual(method: Compressor) -> bool:
    """Whether ``method`` itself remembers what it did not send."""
    return isinstance(method, ErrorFeedback) or getattr(method, "feedback", False)
