"""What FSDP2 calls instead of its own reduce-scatter and all-gather.

torch calls both on a side stream on CUDA and waits for that stream where it must, so everything here stays on the
stream that is current, and nothing waits on the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from strategies import transport
from strategies.compressors import Codec
from strategies.fsdp2_units import ShardedModule
from strategies.units import Unit


class _Allocator:
    """Fresh buffers from torch's own allocator."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``torch.distributed.fsdp`` ``Comm.allocate``."""
        return torch.empty(*size, dtype=dtype, device=device)


class UnitReduceScatter(_Allocator, ReduceScatter):
    """The reduce-scatter of one FSDP2 module.

    Args:
        unit: The module's gradient.
        reduce: Called as ``reduce(unit, grad [n·s], output [s])``; writes the *mean*.
    """

    def __init__(self, unit: Unit, reduce: Callable[[Unit, Tensor, Tensor], None]) -> None:
        self.unit = unit
        self.reduce = reduce

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Reduce as ``op`` asks.

        Raises:
            RuntimeError: Some parameter got no gradient, so that the layout is not the unit's.
            ValueError: ``op`` scales by a factor that cannot be read from it.
        """
        if input_tensor.numel() != self.unit.numel:
            raise RuntimeError(
                f"unit {self.unit.name!r}: gradient of {input_tensor.numel()} elements instead of {self.unit.numel}: a "
                "parameter got no gradient in this step. Freeze it (requires_grad=False) before the strategy shards."
            )
        self.unit.group = group  # the same ranks; torch may give reductions a communicator of their own
        factor = _times_mean(op, self.unit)
        self.reduce(self.unit, input_tensor, output_tensor)
        if factor != 1:
            output_tensor.mul_(factor)


def _times_mean(op: Any, unit: Unit) -> int:
    """What the mean has to be multiplied by to be what ``op`` promises."""
    if op == dist.ReduceOp.AVG:
        return 1
    if op == dist.ReduceOp.SUM:
        return unit.world_size
    raise ValueError(
        f"unit {unit.name!r}: cannot reduce with {op}; call set_force_sum_reduction_for_comms(True) on the module, so "
        "that torch divides by the gradient factor itself"
    )


class CountedAllGather(_Allocator, AllGather):
    """Gathers one module's parameters as they are, counted and timed.

    Args:
        sharded: The module.
    """

    def __init__(self, sharded: ShardedModule) -> None:
        self.sharded = sharded

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather ``input_tensor [s]`` (in the compute dtype) into ``output_tensor [n·s]``."""
        if group.size() != self.sharded.gathered.world_size:
            return _inside_node(self.sharded, output_tensor, input_tensor, group, async_op)
        return transport.gather_parameters(input_tensor, output_tensor, self.sharded.gathered, async_op)


class EncodedAllGather(_Allocator, AllGather):
    """Gathers the parameters of one module as a codec encodes them.

    Under mixed precision FSDP2 hands over a shard that is already rounded to the compute dtype. It is ignored: what is
    encoded is the fp32 shard that the optimizer steps, so values are rounded once, and a scale is that of the exact
    block. Every rank decodes the same bytes, its own included, so all compute with equal weights. The master weights
    stay exact; checkpoints and exports hold them.

    Bytes sent for Int8: P(1 + 4/B)(n−1)/n per gather of P parameters, against 4P(n−1)/n in fp32, 2P(n−1)/n in bf16.

    Args:
        sharded: The module.
        codec: Encodes a shard as one row; "linear" or stochastic methods are fine, stateful ones make no sense.
        tell_time: Sets a unit's seed and step, which stochastic methods draw by.
    """

    def __init__(self, sharded: ShardedModule, codec: Codec, tell_time: Callable[[Unit], None] | None = None) -> None:
        self.sharded = sharded
        self.codec = codec
        self._tell_time = tell_time

    def _payload(self, values: Tensor) -> dict[str, Tensor]:
        """This rank's shard ``[s]``, encoded; the same for all gathers between two optimizer steps."""
        unit = self.sharded.gathered
        if self._tell_time is not None:
            self._tell_time(unit)
        return self.codec.encode(values[None], unit)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Encode this rank's shard, gather all, decode into ``output_tensor [n·s]``; done on the current stream."""
        if group.size() != self.sharded.gathered.world_size:
            return _inside_node(self.sharded, output_tensor, input_tensor, group, async_op)
        unit, traffic = self.sharded.gathered, self.sharded.gathered.traffic
        with traffic.timed(unit.name, "encode", output_tensor.device):
            payload = self._payload(self.sharded.master_shard())
        gathered = transport.gather_encoded(payload, unit, parameters=True)
        traffic.gathers(unit.numel, unit.world_size)
        with traffic.timed(unit.name, "decode", output_tensor.device):
            rows = output_tensor.view(unit.world_size, -1)
            for rank, row in enumerate(rows):  # row by row: the fp32 copies never exist together
                part = {role: values[rank : rank + 1] for role, values in gathered.items()}
                row.copy_(self.codec.decode(part, row.numel(), unit)[0])
        return None


def _inside_node(
    sharded: ShardedModule, output: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """Gather what a node's ranks have kept of the parameters as forward saw them: in the compute dtype, as they are."""
    return transport.gather_parameters(own, output, replace(sharded.gathered, group=group, level="intra"), async_op)


class DifferenceAllGather(EncodedAllGather):
    """Gathers what has become of the parameters of one module since they were last gathered, as a codec encodes it.

    Every rank keeps the weights as all know them. The owner of a shard encodes its difference from them, all add the
    decoded difference, and so what was lost is part of the next difference (SDP4Bit, arXiv 2410.15526). An optimizer
    step moves weights little: few bits do. Between two steps nothing is sent at all, so that forward and backward see
    the same weights for one gather. The first gather of a run is exact.

    Costs the whole module in the compute dtype on every rank, which full sharding would save.

    Args:
        sharded: The module.
        codec: Encodes a shard's difference as one row.
        tell_time: See ``EncodedAllGather``.
        version: Counts whatever changes weights, alike on all ranks.

    Attributes:
        kept: This rank's shard of the weights as all know them, for checkpoints.
    """

    def __init__(
        self, sharded: ShardedModule, codec: Codec, tell_time: Callable[[Unit], None], version: Callable[[], int]
    ) -> None:
        super().__init__(sharded, codec, tell_time)
        gathered = sharded.gathered
        self.kept = replace(gathered, name=f"{gathered.name} as known", state={})
        self.version = version
        self._known: Tensor | None = None  # of all ranks
        self._own: Tensor | None = None  # this rank's part, as it was put into ``kept``
        self._at = -1

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """See ``EncodedAllGather.__call__``."""
        unit, dtype = self.sharded.gathered, output_tensor.dtype
        rows = output_tensor.view(unit.world_size, -1)
        own, known = self.kept.state.get("known"), self._known
        if own is None:  # a run begins
            known = self._exact(self.sharded.master_shard().to(dtype))
            self._keep(known)
        elif known is None or own is not self._own:  # it goes on
            known = self._exact(own.to(dtype))
            self._known, self._own = known, own  # known from now on: gathered whole once, not until the next step
            self._at = self.version() if self.kept.state["current"].item() else -1
        if self._at != self.version():
            self._update(known)
            self._keep(known)
        rows.copy_(known)
        return None

    def _update(self, known: Tensor) -> None:
        unit, traffic = self.sharded.gathered, self.sharded.gathered.traffic
        with traffic.timed(unit.name, "encode", known.device):
            difference = self.sharded.master_shard().sub_(known[unit.rank])
            payload = self._payload(difference)
        gathered = transport.gather_encoded(payload, unit, parameters=True)
        traffic.gathers(unit.numel, unit.world_size)
        with traffic.timed(unit.name, "decode", known.device):
            for rank, row in enumerate(known):
                part = {role: values[rank : rank + 1] for role, values in gathered.items()}
                row.copy_(self.codec.decode(part, row.numel(), unit)[0].add_(row))

    def _exact(self, own: Tensor) -> Tensor:
        """Every rank's shard ``[n, s]``, as it is."""
        unit = self.sharded.gathered
        known = torch.empty(unit.world_size, own.numel(), dtype=own.dtype, device=own.device)
        transport.gather_parameters(own, known.view(-1), unit)
        return known

    def _keep(self, known: Tensor) -> None:
        self._known, self._own, self._at = known, known[self.sharded.gathered.rank].clone(), self.version()
        self.kept.state |= {"known": self._own, "current": torch.ones((), dtype=torch.bool)}

    def changed(self) -> None:
        """Weights have changed since they were gathered."""
        if "current" in self.kept.state:
            self.kept.state["current"] = torch.zeros((), dtype=torch.bool)


def count_replica_all_reduce(unit: Unit, replicas: dist.ProcessGroup) -> Callable[[Tensor], None]:
    """A hook that counts the all-reduce that HSDP has just made over ``replicas``; torch itself does not tell its time.

    Args:
        unit: The module's gradient.
        replicas: Ranks with copies of the same shard.
    """

    between = replace(unit, group=replicas, level="inter")

    def count(shard: Tensor) -> None:
        ideal = 2 * transport.ring_bytes(4 * shard.numel(), replicas.size())
        unit.traffic.baseline(unit.name, ideal, ideal * shard.element_size() / 4)
        unit.traffic.called(unit.name, "all_reduce")
        transport.count(between, "all_reduce", "values", round(ideal * shard.element_size() / 4))

    return count
