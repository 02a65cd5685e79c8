"""Both halves of an all-reduce in codes: gradients on the way to their owners, and the mean on its way back."""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from strategies import residuals, transport
from strategies.compressors.base import Codec, Compressor, Use
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.kernels import Job
from strategies.units import Unit


class Bidirectional(Compressor):
    """Reduce by ``inner``, average in fp32, and send the mean back as ``back`` encodes it.

    For whatever is all-reduced: DDP's buckets, shards between replicas, outer steps of local training. Other methods
    gather the mean in fp32 there, which is then most of what is sent. All ranks, a part's owner included, go on with
    the decoded mean, so they stay equal. Under full sharding nothing travels back: this is ``inner``.

    With ``inner=ErrorFeedback(…)`` what the second rounding takes from the mean is not lost either (Tang et al.,
    DoubleSqueeze, arXiv 1905.05957, keep a second residual for it): the owner adds n times the error to its own
    residual, since a mean over n ranks is made of it. So there is one residual, saved and resized as ever.

    Bytes sent in an all-reduce: those of ``inner``, and (n−1)/n of N encoded elements.

    Args:
        inner: The method on the way to the owners, alone or in ``ErrorFeedback``.
        back: The codec on the way back; by default that of ``inner``.

    Raises:
        ValueError: There is no ``back``, and ``inner`` is no codec.
    """

    def __init__(self, inner: Compressor, back: Codec | None = None) -> None:
        method = inner.inner if isinstance(inner, ErrorFeedback) else inner
        if back is None and not isinstance(method, Codec):
            raise ValueError(f"Bidirectional(inner={inner!r}): that is no codec; give one for the way back, back=…")
        self.inner, self.back = inner, back
        self._codec = back if isinstance(back, Codec) else type(method)(**method.arguments())
        self.unbiased, self.contractive, self.linear = inner.unbiased, inner.contractive, inner.linear
        self.sparsifier, self.stateful = inner.sparsifier, inner.stateful

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls(Int8()), cls(ErrorFeedback(Int4()), Int8())]

    def for_feedback(self) -> Compressor:
        """None: a residual around this would not see what the way back loses.

        Raises:
            ValueError: Always; it says how.
        """
        raise ValueError(
            f"ErrorFeedback(inner={self!r}): put error feedback inside, Bidirectional(inner=ErrorFeedback(…)): there "
            "it sees what both ways lose"
        )

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``."""
        return self.inner.warm_up(job, use) | self._codec.warm_up(replace(job, dtype=torch.float32), "apart")

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        self.inner.reduce_scatter(grad, output, unit, sent)

    def all_reduce(self, grad: Tensor, unit: Unit) -> None:
        """See ``Compressor.all_reduce``."""
        n = unit.world_size
        padded = torch.nn.functional.pad(grad, (0, -grad.numel() % n))
        shard = torch.empty(padded.numel() // n, dtype=torch.float32, device=grad.device)
        self.inner.reduce_scatter(padded, shard, unit)
        size, first = shard.numel(), unit.rank * shard.numel()
        with unit.traffic.timed(unit.name, "encode", grad.device):
            own = unit.compact(size, "back")
            own.padding = unit.padding_within(first, first + size)
            payload = self._codec.encode(shard[None], own)
        gathered = transport.gather_encoded(payload, own)
        with unit.traffic.timed(unit.name, "decode", grad.device):
            for rank in range(n):  # one at a time: the decoded copies never exist together
                part = {role: values[rank : rank + 1] for role, values in gathered.items()}
                decoded = self._codec.decode(part, size, own)[0]
                unit.clear_padding(decoded, rank * size)
                padded[rank * size : (rank + 1) * size] = decoded
                if rank == unit.rank and isinstance(self.inner, ErrorFeedback):
                    _owe(shard.sub_(decoded), padded.numel(), unit, self.inner.storage)
            grad.copy_(padded[: grad.numel()])


def _owe(lost: Tensor, numel: int, unit: Unit, storage: residuals.Storage) -> None:
    """Add what the way back has ``lost [s]`` of the mean, where that is finite, to this rank's residual ``[numel]``."""
    owed = residuals.load(unit, "residual", numel, lost.device)
    first = unit.rank * lost.numel()
    owed[first : first + lost.numel()] += lost.nan_to_num_(0.0, 0.0, 0.0).mul_(unit.world_size)
    residuals.store(unit, "residual", owed, storage)
