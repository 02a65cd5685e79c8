"""`python -m bench collectives`: measure between the ranks at hand, then table, plot and record."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.network.launch import Host, run_hosts, stop_signals_raise
from common.records import record
from common.tables import Table

console = Console()


def collectives(
    ranks: int = 2,
    smallest: int = 4096,
    largest: int = 16_777_216,
    budget_s: float = 0.5,
    records: Path | None = None,
    plot: Path | None = None,
    markdown: bool = False,
) -> int:
    """Measure latency and bandwidth of collectives over message sizes, between the ranks at hand.

    Under torchrun, SLURM with torchrun, or `python -m bench link -- python -m bench collectives` those are the ranks
    that were started; else `ranks` processes are started on this machine. NCCL where every rank has a GPU of its own,
    else gloo on the CPU. Bandwidth is what an ideal algorithm would have to send over the time taken: gloo's
    reduce-scatter, which sends twice that, shows half.

    Args:
        ranks: Processes to start when none were.
        smallest: Smallest message in bytes.
        largest: Largest message; sizes grow fourfold.
        budget_s: Seconds for one collective at one size.
        records: File to which a record of kind "collectives" is appended.
        plot: PNG or SVG file for time and bandwidth over message size.
        markdown: Print a Markdown table.
    """
    import torch.distributed as dist  # takes two seconds, which other commands do without

    from bench.network import collectives as measuring

    messages = measuring.sizes(smallest, largest)
    if "RANK" not in os.environ:
        if ranks < 2:
            raise ValueError(f"ranks must be at least 2, got {ranks}")
        arguments = [f"--smallest={smallest}", f"--largest={largest}", f"--budget_s={budget_s}"]
        arguments += [f"--records={records}"] if records else []
        arguments += [f"--plot={plot}"] if plot else []
        arguments += ["--markdown"] if markdown else []
        return _start(ranks, arguments)
    backend, device = measuring.place()
    dist.init_process_group(backend)
    try:
        points = measuring.measure(messages, device, budget_s)
        leading, world_size = dist.get_rank() == 0, dist.get_world_size()
    finally:
        dist.destroy_process_group()
    if leading:
        entry = _record(points, backend, device.type, world_size)
        if records is not None:
            record.append(records, entry)
        if plot is not None:
            _plot(entry, plot)
        _show(entry, markdown)
    return 0


def _start(ranks: int, arguments: list[str]) -> int:
    """Start the same command as `ranks` local processes, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1)}
    command = [sys.executable, "-m", "bench", "collectives", *arguments]
    environments = [{**common, **threads, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    hosts = [
        Host(command, {name: str(value) for name, value in each.items()}, f"rank {each['RANK']}")
        for each in environments
    ]
    with stop_signals_raise():
        return run_hosts(hosts).status


def _record(points: list[dict[str, Any]], backend: str, device: str, world_size: int) -> dict[str, Any]:
    from bench.network import collectives as measuring

    return {
        "kind": "collectives",
        "backend": backend,
        "device": device,
        "world_size": world_size,
        "link_rate": None,
        "link_emulated": None,
        **record.link(),
        "points": points,
        "summary": measuring.summary(points),
        "peer_bandwidth": measuring.peer_copies(),
        **record.stamp(),
    }


def _title(entry: dict[str, Any]) -> str:
    link = f", each on a host with a {entry['link_rate']} link" if entry["link_rate"] else ", on this machine"
    return f"{entry['backend']}, {entry['world_size']} ranks{link}"


def _show(entry: dict[str, Any], markdown: bool) -> None:
    from bench.network import collectives as measuring

    tables = measuring.tables(entry["points"], _title(entry))
    if entry["peer_bandwidth"] is not None:
        rows = [[f"GPU {i}", *(rate / 1e9 for rate in row)] for i, row in enumerate(entry["peer_bandwidth"])]
        tables.append(Table(["from \\ to (GB/s)", *(f"GPU {i}" for i in range(len(rows)))], rows))
    for one in tables:
        if markdown:
            print(one.markdown())
        else:
            console.print(one)


def _plot(entry: dict[str, Any], path: Path) -> None:
    """Time and bandwidth over message size, one line an operation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in entry["summary"]:
        points = [point for point in entry["points"] if point["operation"] == name]
        bytes_ = [point["message_bytes"] for point in points]
        left.plot(bytes_, [point["time_ms"] for point in points], marker="o", label=name)
        right.plot(bytes_, [point["bandwidth"] / 1e6 for point in points], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="message (bytes)", ylabel="median time of the slowest rank (ms)")
    right.set(xscale="log", yscale="log", xlabel="message (bytes)", ylabel="ideal bytes over time (MB/s)")
    left.legend()
    figure.suptitle(_title(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
