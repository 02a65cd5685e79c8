"""What a gradient compressor is.

Shape legend: N elements of a unit's flat gradient, n ranks, s = N/n elements of one rank's shard, B of a block.
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from common.variants import Variant
from strategies import transport
from strategies.kernels import Job
from strategies.units import Unit

Use = Literal["reduce", "owing", "apart"]


class Compressor(Variant):
    """Reduces the gradients of one FSDP unit over all ranks, sending fewer bytes than torch would.

    Subclass it directly when a method needs collectives of its own; otherwise subclass ``Codec``.

    Attributes (of the class, or of an instance whose arguments decide):
        unbiased: The expectation of what is received equals what was sent.
        contractive: ‖x − C(x)‖² ≤ (1 − δ)‖x‖² for some δ > 0, in expectation: safe under error feedback.
        linear: C(x) + C(y) = C(x + y), so codes can be summed on the way.
        sparsifier: Sends only some elements.
        stateful: Keeps something in ``unit.state`` between steps.
        owes: What it keeps are gradients that have yet to be sent.
        frozen_from: Optimizer steps after which what is reduced is Adam's momentum, and its variance is frozen.
        every_step: Is about the gradients of consecutive steps, and nothing that is averaged more rarely.
    """

    unbiased: bool = False
    contractive: bool = False
    linear: bool = False
    sparsifier: bool = False
    stateful: bool = False
    owes: bool = False
    every_step: bool = False
    frozen_from: int | None = None

    def for_feedback(self) -> "Compressor":
        """The form of this method that error feedback may use.

        Raises:
            ValueError: There is none: the residual would grow without bound.
        """
        if not self.contractive:
            raise ValueError(
                f"ErrorFeedback(inner={self!r}): the inner method is not contractive, so the residual would grow "
                "without bound. Use a contractive one (Int8, TopK, OneBit, …) or no error feedback."
            )
        return self

    def parts(self) -> "list[Compressor]":
        """The methods that this one was given."""
        values = self.arguments().values()
        flat = [part for value in values for part in (value.values() if isinstance(value, dict) else (value,))]
        return [part for part in flat if isinstance(part, Compressor)]

    def meet(self, units: list[Unit]) -> None:
        """Get to know all units that this method will reduce, before the first gradient."""

    def chosen(self) -> dict[str, str]:
        """The method that each unit has now, where that is chosen in training."""
        return {}

    def within(self) -> "list[Compressor]":
        """This method and all methods inside it."""
        return [self, *(deeper for part in self.parts() for deeper in part.within())]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """Prepare the arithmetic before the first backward pass; see ``strategies.kernels``.

        Args:
            job: What to prepare for.
            use: What gradients go through: plain reductions ("reduce"), reductions with error feedback ("owing"), or
                encoding and decoding one by one ("apart", as parameter gathers do).

        Returns:
            The backends in use afterwards; empty when nothing has any choice.
        """
        return {backend for part in self.parts() for backend in part.warm_up(job, use)}

    @abstractmethod
    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """Write this rank's shard of the mean gradient.

        Args:
            grad: This rank's whole gradient ``[N]``, contiguous; may be overwritten unless ``sent`` is given.
            output: The shard ``[s]``, uninitialised.
            unit: Identity of the FSDP unit.
            sent: Where given, ``float32 [N]`` to fill with what the owners understand of this rank's gradient: the mean
                of all ranks' ``sent`` is what all the outputs hold. Error feedback keeps the difference.
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

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """Encode per destination, exchange, decode, average in fp32. See ``Compressor.reduce_scatter``."""
        traffic = unit.traffic
        chunks = grad.view(unit.world_size, -1)
        size = chunks.shape[1]
        with traffic.timed(unit.name, "encode", grad.device):
            payload = self.encode(chunks, unit)
            if sent is not None:
                sent.view(chunks.shape).copy_(self.decode(payload, size, unit))
                unit.clear_padding(sent, 0)
        self.deliver(payload, output, unit)
        if traffic.sampling and traffic.fidelity is not None:
            decoded = sent.view(chunks.shape) if sent is not None else self.decode(payload, size, unit)
            traffic.fidelity.add(chunks, decoded)

    def deliver(self, payload: dict[str, Tensor], output: Tensor, unit: Unit) -> None:
        """Send row r of the payload to rank r; write the mean of what arrives into ``output [s]``."""
        received = transport.all_to_all(payload, unit)
        with unit.traffic.timed(unit.name, "decode", output.device):
            self.average(received, output, unit)
            unit.clear_padding(output, unit.rank * output.numel())

    def average(self, received: dict[str, Tensor], output: Tensor, unit: Unit) -> None:
        """Write the mean over ranks, in rank order, into ``output [s]``; row r of ``received`` came from rank r.

        One row at a time: the n decoded copies never exist together.
        """
        size = output.numel()
        total = self.decode({role: part[:1] for role, part in received.items()}, size, unit)[0]
        for rank in range(1, unit.world_size):
            total += self.decode({role: part[rank : rank + 1] for role, part in received.items()}, size, unit)[0]
        output.copy_(total.mul_(1 / unit.world_size))
