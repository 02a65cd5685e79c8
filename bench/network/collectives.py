"""Latency and bandwidth of the collectives between the ranks at hand, over message sizes.

Bandwidth is what the wire must carry at least: the bytes a rank has to send in an ideal (ring) algorithm over the
median time. So a collective that sends more than it must shows less than the link's rate: gloo's reduce-scatter is an
all-reduce that throws away the rest (2.00 times the bytes), and its all-to-all sends before it receives, so that the
directions of a link take turns. "exchange" posts the receives first, as Pare's transport does.

n ranks; a message of S bytes is the whole tensor: the input of reduce-scatter, all-reduce and all-to-all, the output of
all-gather.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.tables import Table

_WARMUP, _MIN_REPEATS, _MAX_REPEATS = 2, 5, 200
# torch 2.13 renamed these; the old names warn there, the new ones do not exist before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Bytes a rank must send, as a multiple of the message S, by number of ranks n.
SHARE: dict[str, Callable[[int], float]] = {
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "exchange": lambda n: (n - 1) / n,
    "point_to_point": lambda n: 1.0,
}


def sizes(smallest: int = 4096, largest: int = 16_777_216) -> list[int]:
    """Message sizes in bytes, each four times the one before.

    Raises:
        ValueError: They are not positive and in order.
    """
    if not 0 < smallest <= largest:
        raise ValueError(f"message sizes must satisfy 0 < smallest <= largest, got {smallest} and {largest}")
    found = [smallest]
    while found[-1] * 4 <= largest:
        found.append(found[-1] * 4)
    return found


def _exchange(received: Tensor, sent: Tensor) -> None:
    """All-to-all of rows with the receives posted first; see `strategies/transport.py`."""
    own, n = dist.get_rank(), dist.get_world_size()
    received[own].copy_(sent[own])
    others = [rank for rank in range(n) if rank != own]
    receives = [dist.P2POp(dist.irecv, received[rank], rank) for rank in others]
    sends = [dist.P2POp(dist.isend, sent[rank], rank) for rank in others]
    for work in dist.batch_isend_irecv(receives + sends):
        work.wait()


def _point_to_point(message: Tensor) -> None:
    """From the first rank to the last; the others wait at the barrier that follows."""
    last = dist.get_world_size() - 1
    if dist.get_rank() == 0:
        dist.send(message, last)
    elif dist.get_rank() == last:
        dist.recv(message, 0)


def operations(nbytes: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each collective on a float32 message of about `nbytes` (a multiple of 4·n)."""
    n = dist.get_world_size()
    elements = max(1, nbytes // (4 * n))
    whole, other = (torch.ones(n, elements, device=device) for _ in range(2))
    shard = torch.ones(elements, device=device)
    return {
        "reduce_scatter": lambda: _reduce_scatter(shard, whole.view(-1)),
        "all_gather": lambda: _all_gather(other.view(-1), shard),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "exchange": lambda: _exchange(other, whole),
        "point_to_point": lambda: _point_to_point(whole),
    }


def _time_once(operation: Callable[[], object], device: torch.device) -> float:
    """Seconds until this rank is done, all having started together."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _agreed_repeats(seconds: float, budget_s: float, device: torch.device) -> int:
    """How often all ranks repeat a measurement that took rank 0 `seconds`."""
    wanted = min(max(round(budget_s / max(seconds, 1e-9)), _MIN_REPEATS), _MAX_REPEATS)
    agreed = torch.tensor([wanted], device=device)
    dist.broadcast(agreed, 0)
    return int(agreed)


def measure(messages: Sequence[int], device: torch.device, budget_s: float = 0.5) -> list[dict[str, Any]]:
    """Measure every collective at every size; collective over all ranks.

    Args:
        messages: Sizes S in bytes.
        device: Where the tensors are.
        budget_s: Seconds for one collective at one size; at least 5 repeats are made.

    Returns:
        A point each: operation, message_bytes, sent_bytes (ideal, per rank), repeats, time_ms (median over repeats of
        the slowest rank), time_ms_p90, bandwidth (bytes/s).
    """
    points = []
    n = dist.get_world_size()
    for nbytes in messages:
        actual = max(1, nbytes // (4 * n)) * 4 * n
        for name, operation in operations(nbytes, device).items():
            first = [_time_once(operation, device) for _ in range(_WARMUP)][-1]
            repeats = _agreed_repeats(first, budget_s, device)
            own = torch.tensor([_time_once(operation, device) for _ in range(repeats)], dtype=torch.float64)
            slowest = own.to(device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            p50, p90 = np.percentile(slowest.cpu().numpy(), [50, 90]).tolist()
            sent = SHARE[name](n) * actual
            points.append(
                {
                    "operation": name,
                    "message_bytes": actual,
                    "sent_bytes": round(sent),
                    "repeats": repeats,
                    "time_ms": p50 * 1e3,
                    "time_ms_p90": p90 * 1e3,
                    "bandwidth": sent / p50,
                }
            )
    return points


def peer_copies(nbytes: int = 268_435_456, repeats: int = 10) -> list[list[float]] | None:
    """Bandwidth (bytes/s) of a copy from each GPU (row) to each GPU (column), the diagonal within one; None without.

    On the diagonal every byte is read and written in the same memory.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [[_copy_rate(a, b, nbytes, repeats) for b in range(count)] for a in range(count)] or None


def _copy_rate(source: int, target: int, nbytes: int, repeats: int) -> float:
    data = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{source}")
    copy = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{target}")
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        begin = time.perf_counter()
        copy.copy_(data)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        seconds.append(time.perf_counter() - begin)
    return nbytes / statistics.median(seconds[1:])


def place() -> tuple[str, torch.device]:
    """Backend and device of this rank: NCCL where every local rank has a GPU of its own, else gloo on the CPU."""
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        torch.cuda.set_device(local)
        return "nccl", torch.device("cuda", local)
    return "gloo", torch.device("cpu")


def summary(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per operation: latency_us (time of the smallest message) and peak_bandwidth (bytes/s)."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(point["operation"] for point in points):
        own = [point for point in points if point["operation"] == name]
        smallest = min(own, key=lambda point: point["message_bytes"])
        peak = max(point["bandwidth"] for point in own)
        found[name] = {"latency_us": smallest["time_ms"] * 1e3, "peak_bandwidth": peak}
    return found


def tables(points: Sequence[dict[str, Any]], title: str) -> list[Table]:
    """Time and bandwidth, a row per size and a column per operation, and latency and peak of each operation."""
    names = list(dict.fromkeys(point["operation"] for point in points))
    found = {(point["operation"], point["message_bytes"]): point for point in points}
    messages = sorted({point["message_bytes"] for point in points})

    def over_sizes(field: str, scale: float, what: str) -> Table:
        rows = [[nbytes, *(found[name, nbytes][field] / scale for name in names)] for nbytes in messages]
        return Table(["message (bytes)", *names], rows, f"{what}: {title}")

    totals = [[name, one["latency_us"], one["peak_bandwidth"] / 1e6] for name, one in summary(points).items()]
    return [
        over_sizes("time_ms", 1, "time (ms)"),
        over_sizes("bandwidth", 1e6, "bandwidth (MB/s)"),
        Table(["operation", "latency (µs)", "peak bandwidth (MB/s)"], totals),
    ]
