"""What a gradient compressor is.

Shape legend: N elements of a unit's flat gradient, n ranks, s = N/n elements of one rank's shard, B of a block.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies import transport
from strategies.units import Unit


class Compressor(ABC):
    """Reduces the gradients of one FSDP unit over all ranks, sending fewer bytes than torch would.

    Subclass it directly when a method needs collectives of its own; otherwise subclass ``Codec``.

    Class attributes:
        unbiased: The expectation of what is received equals what was sent.
        contractive: ‖x − C(x)‖ ≤ (1 − δ)‖x‖ for some δ > 0: safe under error feedback.
        linear: C(x) + C(y) = C(x + y), so codes can be summed on the way.
    """

    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The method's name in records and tables: its file's."""
        return type(self).__module__.rpartition(".")[2]

    def config(self) -> dict[str, Any]:
        """The constructor arguments, for the run record."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @abstractmethod
    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit) -> None:
        """Write this rank's shard of the mean gradient.

        Args:
            grad: This rank's whole gradient ``[N]``, contiguous; may be overwritten.
            output: The shard ``[s]``, uninitialised.
            unit: Identity of the FSDP unit.
        """

    def all_reduce(self, grad: Tensor, unit: Unit) -> None:
        """Replace ``grad [N]`` by the mean gradient, for NO_SHARD: reduce-scatter, then gather the exact shards.

        Every rank ends with the same values, because each shard is averaged once, by its owner.
        """
        n = unit.world_size
        padded = torch.nn.functional.pad(grad, (0, -grad.numel() % n))
        shard = torch.empty_like(padded[: padded.numel() // n])
        self.reduce_scatter(padded, shard, unit)
        transport.all_gather(shard, padded, unit)
        grad.copy_(padded[: grad.numel()])


class Codec(Compressor):
    """A compressor made of two pure functions; the base moves the payload.

    Row r of the payload goes to rank r in one all-to-all; the owner of a shard decodes every rank's row and averages in
    fp32. Nothing overflows, the gradient is quantised exactly once, and low-bit numbers stay low-bit on the wire. This
    is the pattern of ZeRO++'s qgZ (arXiv 2306.10209) within one level.
    """

    @abstractmethod
    def encode(self, chunks: Tensor, unit: Unit) -> dict[str, Tensor]:
        """Compress ``chunks [n, s]`` into tensors ``[n, …]`` by role: "values", "indices", "scales" or "tables".

        Shapes may depend on ``s`` only, never on the data. NaN and Inf must make the decoded block non-finite, so that
        a bad gradient is seen and not averaged in.
        """

    @abstractmethod
    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """Reconstruct ``float32 [k, size]`` from k rows of a payload."""

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit) -> None:
        """Encode per destination, exchange, decode, average in fp32. See ``Compressor.reduce_scatter``."""
        traffic = unit.traffic
        chunks = grad.view(unit.world_size, -1)
        with traffic.timed(unit.name, "encode", grad.device):
            payload = self.encode(chunks, unit)
        received = transport.all_to_all(payload, unit)
        with traffic.timed(unit.name, "decode", grad.device):
            output.copy_(self._mean(received, chunks.shape[1], unit))
        if traffic.sampling and traffic.fidelity is not None:
            traffic.fidelity.add(chunks, self.decode(payload, chunks.shape[1], unit))

    def _mean(self, received: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """Average over ranks in rank order, one row at a time: the n decoded copies never exist together."""
        total = self.decode({role: part[:1] for role, part in received.items()}, size, unit)[0]
        for rank in range(1, unit.world_size):
            total += self.decode({role: part[rank : rank + 1] for role, part in received.items()}, size, unit)[0]
        return total.div_(unit.world_size)


def known_compressors() -> list[type[Compressor]]:
    """Every concrete compressor that has been imported, by class name."""
    found: set[type[Compressor]] = set()
    waiting = Compressor.__subclasses__()
    while waiting:
        cls = waiting.pop()
        found.add(cls)
        waiting += cls.__subclasses__()
    return sorted((cls for cls in found if not inspect.isabstract(cls)), key=lambda cls: cls.__name__)
