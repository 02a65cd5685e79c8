"""The collectives of the gradient path: each one counts the bytes that leave this rank and times the wire.

`n` is the number of ranks, `s` the elements of one rank's shard.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.units import Unit

_ALIGNMENT = 16  # bytes; parts and rows start on it, so that receivers read whole vectors

# torch 2.13 renamed these; the old names warn there, the new ones do not exist before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ring_bytes(nbytes: int, world_size: int) -> float:
    """Bytes each rank must send to reduce-scatter (or all-gather) ``nbytes`` of full tensor: (n−1)/n of it."""
    return nbytes * (world_size - 1) / world_size


def reduce_scatter_factor(group: dist.ProcessGroup | None) -> int:
    """How many times the ring's bytes a native reduce-scatter sends.

    gloo has no reduce-scatter of its own: it runs an all-reduce and drops the rest, which is 2.00 times the ring's
    bytes on the wire (measured; pytorch issue 118911).
    """
    return 2 if dist.get_backend(group) == "gloo" else 1


def reduce_scatter_mean(grad: Tensor, output: Tensor, unit: Unit) -> None:
    """torch's own reduce-scatter, averaged: ``grad [n·s]`` of every rank → ``output [s]``."""
    factor = reduce_scatter_factor(unit.group)
    with unit.traffic.timed(unit.name, "wire", grad.device, "reduce_scatter"):
        _reduce_scatter(output, grad, group=unit.group)
    output.div_(unit.world_size)
    unit.traffic.called(unit.name, "reduce_scatter")
    nbytes = round(factor * ring_bytes(grad.nbytes, unit.world_size))
    count(unit, "reduce_scatter", "values", nbytes)


def all_reduce_mean(grad: Tensor, unit: Unit) -> None:
    """torch's own all-reduce, averaged in place; a ring sends 2(n−1)/n of the tensor."""
    with unit.traffic.timed(unit.name, "wire", grad.device, "all_reduce"):
        dist.all_reduce(grad, group=unit.group)
    grad.div_(unit.world_size)
    unit.traffic.called(unit.name, "all_reduce")
    count(unit, "all_reduce", "values", round(2 * ring_bytes(grad.nbytes, unit.world_size)))


def all_gather(shard: Tensor, output: Tensor, unit: Unit, role: str = "values") -> None:
    """Collect every rank's ``shard [s]`` into ``output [n·s]``; the bytes count as ``role``."""
    with unit.traffic.timed(unit.name, "wire", shard.device, "all_gather"):
        _collect(_rows(output, unit.world_size), _bytes(shard), unit.group)
    unit.traffic.called(unit.name, "all_gather")
    count(unit, "all_gather", role, shard.nbytes * (unit.world_size - 1))


def all_to_all(payload: dict[str, Tensor], unit: Unit) -> dict[str, Tensor]:
    """Send row r of every tensor to rank r, all of them in one buffer and one collective.

    Args:
        payload: Tensors ``[n, …]`` by role ("values", "indices", "scales", …); every rank passes the same shapes and
            dtypes, since a receiver knows them only from its own.
        unit: The FSDP unit the payload belongs to.

    Returns:
        The received tensors, shaped like ``payload``: row r came from rank r.
    """
    n = unit.world_size
    buffer, spans = _pack(payload, n, unit)
    received = torch.empty_like(buffer)
    with unit.traffic.timed(unit.name, "wire", buffer.device, "all_to_all"):
        _exchange(received, buffer, unit.group)
    unit.traffic.called(unit.name, "all_to_all")
    for role, (_, width) in spans.items():
        count(unit, "all_to_all", role, _padded(width) * (n - 1))
    return {role: _like(payload[role], received[:, first : first + width]) for role, (first, width) in spans.items()}


def gather_parameters(shard: Tensor, output: Tensor, unit: Unit, async_op: bool = False) -> dist.Work | None:
    """Collect a unit's parameters as they are: ``shard [s]`` of every rank → ``output [n·s]``.

    Returns:
        The pending work if ``async_op`` (torch's own), whose time on the wire is then not known.
    """
    work = None
    with unit.traffic.timed(unit.name, "wire", shard.device, "all_gather", parameters=True):
        if async_op:
            work = _all_gather(output, shard, group=unit.group, async_op=True)
        else:
            _collect(_rows(output, unit.world_size), _bytes(shard), unit.group)
    unit.traffic.gathers(output.numel(), unit.world_size)
    unit.traffic.called(unit.name, "all_gather")
    count(unit, "all_gather", "parameters", shard.nbytes * (unit.world_size - 1))
    return work


def gather_encoded(payload: dict[str, Tensor], unit: Unit, parameters: bool = False) -> dict[str, Tensor]:
    """Give every rank every rank's codes, all tensors of a rank in one buffer and one collective.

    Args:
        payload: This rank's tensors ``[1, …]`` by role; every rank passes the same shapes and dtypes.
        unit: The unit whose mean gradient, or whose parameters, the codes are of.
        parameters: Whether they are of parameters: bytes then count as "parameters.values", "parameters.scales", ….

    Returns:
        The tensors ``[n, …]``: row r is rank r's.
    """
    buffer, spans = _pack(payload, 1, unit)
    gathered = torch.empty(unit.world_size, buffer.shape[1], dtype=torch.uint8, device=buffer.device)
    with unit.traffic.timed(unit.name, "wire", buffer.device, "all_gather", parameters=parameters):
        _collect(gathered, buffer[0], unit.group)
    unit.traffic.called(unit.name, "all_gather")
    for role, (_, width) in spans.items():
        sent = _padded(width) * (unit.world_size - 1)
        count(unit, "all_gather", f"parameters.{role}" if parameters else role, sent)
    return {role: _like(payload[role], gathered[:, first : first + width]) for role, (first, width) in spans.items()}


def row_bytes(payload: dict[str, Tensor]) -> int:
    """Bytes that a payload's rows take on the way, each."""
    return sum(_padded(part.nbytes // part.shape[0]) for part in payload.values())


def count(unit: Unit, collective: str, role: str, nbytes: int) -> None:
    """Count ``nbytes`` that leave this rank for others of ``unit.group``."""
    unit.traffic.sent(unit.name, collective, role, nbytes, unit.level)


def _pack(payload: dict[str, Tensor], rows: int, unit: Unit) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """One buffer ``uint8 [rows, bytes]`` that holds a payload, and where each role lies in a row: (start, bytes)."""
    parts = {role: part.contiguous().view(rows, -1).view(torch.uint8) for role, part in payload.items()}
    spans, end = {}, 0
    for role, part in parts.items():
        spans[role] = (end, part.shape[1])
        end += _padded(part.shape[1])
    device = next(iter(parts.values())).device
    with unit.traffic.timed(unit.name, "encode", device):
        buffer = torch.empty(rows, end, dtype=torch.uint8, device=device)
        for role, part in parts.items():
            first, width = spans[role]
            buffer[:, first : first + width].copy_(part)
            buffer[:, first + width : first + _padded(width)].zero_()  # never send uninitialised memory
    return buffer, spans


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _exchange(received: Tensor, buffer: Tensor, group: dist.ProcessGroup | None) -> None:
    """Row r of ``buffer`` to rank r; row r of ``received`` from rank r.

    gloo's own all-to-all sends before it says that it is ready to receive, so the two directions of a link take turns.
    Posting the receives first uses both at once: half the time on a full-duplex link (measured).
    """
    if dist.get_backend(group) != "gloo":
        dist.all_to_all_single(received, buffer, group=group)
        return
    own = dist.get_rank(group)
    received[own].copy_(buffer[own])
    peers = [(rank, peer) for rank, peer in enumerate(dist.get_process_group_ranks(group)) if rank != own]
    receives = [dist.P2POp(dist.irecv, received[rank], peer, group) for rank, peer in peers]
    sends = [dist.P2POp(dist.isend, buffer[rank], peer, group) for rank, peer in peers]
    for work in dist.batch_isend_irecv(receives + sends) if peers else ():
        work.wait()


def _collect(gathered: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """Row r of ``gathered`` from rank r, which has it as ``own``: around the ring, receives posted first.

    See ``_exchange``; gloo's own all-gather does the same in turns, too. Around the ring, a row crosses the link
    between two nodes once, however many ranks they have.
    """
    if dist.get_backend(group) != "gloo" or own.device.type != "cpu":
        _all_gather(gathered.view(-1), own, group=group)
        return
    rank, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    n = len(ranks)
    gathered[rank].copy_(own)
    for turn in range(n - 1):
        coming = dist.P2POp(dist.irecv, gathered[(rank - turn - 1) % n], ranks[(rank - 1) % n], group)
        going = dist.P2POp(dist.isend, gathered[(rank - turn) % n], ranks[(rank + 1) % n], group)
        for work in dist.batch_isend_irecv([coming, going]):
            work.wait()


def _rows(whole: Tensor, n: int) -> Tensor:
    """``[n·s]`` as bytes of each rank, ``uint8 [n, …]``; a view."""
    return whole.view(n, -1).view(torch.uint8)


def _bytes(shard: Tensor) -> Tensor:
    return shard.contiguous().view(-1).view(torch.uint8)


def _like(sent: Tensor, received: Tensor) -> Tensor:
    """View received bytes ``[n, b]`` with the dtype and shape of what was sent; only dim 0 has a foreign stride."""
    return received.view(sent.dtype).unflatten(1, sent.shape[1:]) if sent.dim() > 1 else received.view(sent.dtype)[:, 0]
