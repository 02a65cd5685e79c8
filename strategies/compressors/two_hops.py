"""A reduction in two hops, inside nodes and then between them, so that each byte crosses the slow link once."""

from dataclasses import replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.compressors.base import Codec, Compressor, Use
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.kernels import Job
from strategies.units import Unit


class TwoHops(Compressor):
    """ZeRO++'s qgZ (Wang et al., arXiv 2306.10209): the all-to-all of codes, done inside nodes first.

    In a flat all-to-all every rank sends its own gradient to every shard's owner, and L ranks of a node send L rows to
    the same rank of another node. Here the ranks of a node exchange first, so that each holds the node's mean of 1/L of
    the gradient; encoded anew, only that goes to the other nodes, L times fewer bytes. The gradient is rounded twice.
    The ranks of a process group must be M nodes of L in order. For full sharding, where every rank owns a shard;
    ``replicas`` shard inside nodes alone, which needs more memory, and less of the link for parameters.

    Under ``ErrorFeedback`` what the second hop loses is owed by the rank that encoded it: L times, since a mean over a
    node's ranks is made of it.
    Bytes sent: (L−1)/L of N elements inside the node and (M−1)/M of N/L between nodes, as the codecs encode them.

    Args:
        inner: The codec inside nodes.
        node_size: L, ranks of a node; where a group has no more ranks than that, ``inner`` alone reduces.
        between: The codec between nodes; by default ``inner``.

    Raises:
        ValueError: ``node_size`` is less than 1; in use, if it does not divide the ranks.
    """

    def __init__(self, inner: Codec, node_size: int, between: Codec | None = None) -> None:
        if node_size < 1:
            raise ValueError(f"TwoHops.node_size must be at least 1, got {node_size}")
        self.inner, self.node_size, self.between = inner, node_size, between
        self._second = type(inner)(**inner.arguments()) if between is None else between
        both = (inner, self._second)
        self.unbiased = all(codec.unbiased for codec in both)
        self.contractive = all(codec.contractive for codec in both)
        self.sparsifier = any(codec.sparsifier for codec in both)
        self._groups: dict[tuple[int, ...], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without groups of processes, which another process joins by itself."""
        return {**vars(self), "_groups": {}}

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``: one hop, where a node has all ranks or only one."""
        return [cls(Int8(), 64), cls(Int8(), 1, Int4())]

    def parts(self) -> list[Compressor]:
        """See ``Compressor.parts``."""
        return [self.inner, self._second]

    def for_feedback(self) -> Compressor:
        """Itself around its codecs' forms."""
        second = None if self.between is None else self.between.for_feedback()
        return type(self)(self.inner.for_feedback(), self.node_size, second)  # type: ignore[arg-type]

    def warm_up(self, job: Job, use: Use = "reduce") -> set[str]:
        """See ``Compressor.warm_up``."""
        first = replace(job, ranks=min(self.node_size, job.ranks))
        second = replace(job, ranks=max(1, job.ranks // self.node_size), dtype=torch.float32)
        return self.inner.warm_up(first, use) | self._second.warm_up(second, use)

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        n, inside = unit.world_size, self.node_size
        if n <= inside or inside == 1:
            (self.inner if n <= inside else self._second).reduce_scatter(grad, output, unit, sent)
            return
        if n % inside:
            raise ValueError(f"TwoHops.node_size={inside} does not divide the {n} ranks that share {unit.name!r}")
        nodes, size = n // inside, output.numel()
        node, local = divmod(unit.rank, inside)
        near, far = self._join(unit)
        # for each rank of a node all that its counterparts own, node by node
        order = [owner * inside + row for row in range(inside) for owner in range(nodes)]
        first = _part(unit, order, size, near, f"node {node}", "intra")
        second = _part(unit, order[local * nodes : (local + 1) * nodes], size, far, f"place {local}", "inter")
        with unit.traffic.timed(unit.name, "encode", grad.device):
            rows = grad.view(nodes, inside, size).transpose(0, 1).reshape(-1)
        mean = torch.empty(nodes * size, dtype=torch.float32, device=grad.device)
        told = None if sent is None else torch.empty(rows.numel(), dtype=torch.float32, device=grad.device)
        self.inner.reduce_scatter(rows, mean, first, told)
        if sent is None or told is None:
            self._second.reduce_scatter(mean, output, second)
            return
        understood, traffic = torch.empty_like(mean), unit.traffic
        sampling, traffic.sampling = traffic.sampling, False  # the first hop has reported the whole gradient's error
        self._second.reduce_scatter(mean.clone(), output, second, understood)
        traffic.sampling = sampling
        own = told.view(inside, nodes, size)
        own[local] += (understood - mean).view(nodes, size).mul_(inside)
        sent.view(nodes, inside, size).copy_(own.transpose(0, 1))

    def _join(self, unit: Unit) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """This rank's node, and its counterparts in all nodes; made once, by all ranks at their first reduction."""
        members = dist.get_process_group_ranks(unit.group or dist.group.WORLD)
        key = tuple(members)
        if key not in self._groups:
            node, local = divmod(unit.rank, self.node_size)
            near = members[node * self.node_size : (node + 1) * self.node_size]
            far = members[local :: self.node_size]
            found = [dist.new_group(ranks, use_local_synchronization=True) for ranks in (near, far)]
            self._groups[key] = found[0], found[1]
        return self._groups[key]


def _part(unit: Unit, order: list[int], size: int, group: dist.ProcessGroup, part: str, level: str) -> Unit:
    """The chunks of ``size`` elements in ``order`` as what a hop reduces."""
    padding = [
        (place * size + start, place * size + stop)
        for place, chunk in enumerate(order)
        for start, stop in unit.padding_within(chunk * size, (chunk + 1) * size)
    ]
    merged: list[tuple[int, int]] = []
    for start, stop in padding:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return replace(
        unit,
        parameters=[],
        numel=len(order) * size,
        group=group,
        state={},
        padding=merged,
        part=f"{unit.part}/{part}",
        level=level,
    )
