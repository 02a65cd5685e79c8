"""Emulated hosts: network namespaces joined by rate-limited links, one rank or more in each, started as torchrun would.

Every host has its own address and one cable of the given rate, full duplex, to a switch; the switch, too, is a
namespace, so deleting the namespaces removes everything. The rate limit is a token bucket (tbf) at both ends of the
cable. Hosts share this machine's cores and memory: an emulated link says what the network costs, not what more
machines would compute.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.network.launch import Host, Outcome, StopRequested, run_hosts, stop_signals_raise
from common.records import record

INTERFACE = "eth0"
MASTER_PORT = 29500  # free by construction: each host has its own port space
_PREFIX = "pare"
_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")
_DELAY = re.compile(r"\d+(?:\.\d+)?(us|ms|s)")
_UNIT = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
NEEDS = "root, and iproute2 (ip, tc); in a container also --cap-add=NET_ADMIN --cap-add=SYS_ADMIN"


class LinkUnavailableError(RuntimeError):
    """Links cannot be emulated here; the message says what is missing."""


def rate_bits_per_s(rate: str) -> float:
    """Bits per second of a rate such as "1gbit", "250mbit" or "64kbit".

    Raises:
        ValueError: It is written in another way.
    """
    match = _RATE.fullmatch(rate)
    if not match or not float(match[1]):
        raise ValueError(f"rate {rate!r} must be a number and kbit, mbit or gbit, such as 1gbit or 250mbit")
    return float(match[1]) * _UNIT[match[2]]


def _command(*words: str) -> str:
    """Run an iproute2 command and return its output."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise LinkUnavailableError(f"`{' '.join(words)}` failed: {done.stderr.strip()}. Link emulation needs {NEEDS}.")
    return done.stdout


def _require_tools() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        missing.insert(0, "root")
    if missing:
        raise LinkUnavailableError(f"cannot emulate links: no {', no '.join(missing)}. It needs {NEEDS}.")


def _remove(namespace: str) -> None:
    """Kill what still runs in a namespace and delete it, whatever state it is in."""
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
    for pid in pids:
        try:
            psutil.Process(int(pid)).kill()
        except psutil.NoSuchProcess:
            continue
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _remove_owned(owned: Callable[[int], bool]) -> None:
    """Remove the namespaces whose name carries a process id for which `owned` is true."""
    for line in _command("ip", "netns", "list").splitlines():
        match = re.match(rf"{_PREFIX}-(\d+)-\w+", line)
        if match and owned(int(match[1])):
            _remove(match[0])


def _remove_own() -> None:
    _remove_owned(lambda pid: pid == os.getpid())


def _shape(namespace: str, device: str, rate: str, delay: str | None) -> None:
    """Limit what a device sends to `rate`; delay it, too, when asked."""
    # A packet handed over by the kernel may be 64 kB. A larger bucket would let small messages pass unlimited; at high
    # rates it must still hold what arrives between two timer ticks.
    burst = max(65_536, math.ceil(rate_bits_per_s(rate) / 8 * 100e-6))
    tbf = ["root", "handle", "1:", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms"]
    _command("tc", "-n", namespace, "qdisc", "add", "dev", device, *tbf)
    if delay is None:
        return
    netem = ["parent", "1:1", "netem", "delay", delay, "limit", "100000"]
    try:
        _command("tc", "-n", namespace, "qdisc", "add", "dev", device, *netem)
    except LinkUnavailableError as error:
        raise LinkUnavailableError(f"this kernel cannot delay packets (needs sch_netem): {error}") from error


@contextmanager
def emulated_network(hosts: int, rate: str, delay: str | None = None) -> Iterator[list[str]]:
    """Namespaces of `hosts` emulated hosts joined by a switch; removed on leaving, whatever happens inside.

    Args:
        hosts: Number of hosts, 2 to 200.
        rate: Rate of each host's cable in each direction, such as "1gbit".
        delay: One-way delay a host adds to what it sends, such as "1ms"; the round trip is twice that.

    Yields:
        Names of the namespaces. Host i has address 10.77.0.(i+1) on device eth0.

    Raises:
        LinkUnavailableError: Not root, no iproute2, or the kernel refuses.
        ValueError: An argument is out of range or malformed.
    """
    if not 2 <= hosts <= 200:
        raise ValueError(f"hosts must be 2 to 200, got {hosts}")
    rate_bits_per_s(rate)
    if delay is not None and not _DELAY.fullmatch(delay):
        raise ValueError(f"delay {delay!r} must be a number and us, ms or s, such as 1ms")
    _require_tools()
    # What an emulation that was killed outright could not remove.
    _remove_owned(lambda pid: not psutil.pid_exists(pid))
    switch = f"{_PREFIX}-{os.getpid()}-switch"
    names = [f"{_PREFIX}-{os.getpid()}-h{i}" for i in range(hosts)]
    try:
        _command("ip", "netns", "add", switch)
        _command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            port = f"port{i}"
            _command("ip", "netns", "add", name)
            _command("ip", "link", "add", INTERFACE, "netns", name, "type", "veth", "peer", port, "netns", switch)
            _command("ip", "-n", name, "addr", "add", f"{address(i)}/24", "dev", INTERFACE)
            _command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _command("ip", "-n", name, "link", "set", INTERFACE, "up")
            _command("ip", "-n", name, "link", "set", "lo", "up")
            _shape(name, INTERFACE, rate, delay)
            _shape(switch, port, rate, None)
        yield names
    finally:
        _remove_own()


def address(host: int) -> str:
    """Address of an emulated host."""
    return f"10.77.0.{host + 1}"


def rank_environment(host: int, hosts: int, local: int = 0, ranks: int = 1) -> dict[str, str]:
    """What torchrun sets for rank `local` of `ranks` on node `host` of `hosts`; keeps traffic on the emulated link."""
    rank = host * ranks + local
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(hosts * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": str(host),
        "NODE_RANK": str(host),
        "GROUP_WORLD_SIZE": str(hosts),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(hosts * ranks),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(MASTER_PORT),
        "TORCHELASTIC_RUN_ID": f"{_PREFIX}-{os.getpid()}",
        # The store is served by rank 0, not by a torchrun agent.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        # Without these NCCL recognises one machine and goes through shared memory or InfiniBand, past the link.
        "NCCL_HOSTID": f"{_PREFIX}-host-{host}",
        "NCCL_IB_DISABLE": "1",
    }
    import torch  # takes seconds, and reading a rate, which much does, needs none of it

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",")
        own = [devices[(host * ranks + i) % len(devices)] for i in range(ranks)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, cores // (hosts * ranks)))
    return environment


def interface_bytes(namespace: str) -> dict[str, int]:
    """Bytes a host's interface has sent and received, Ethernet, IP and TCP headers included."""
    folder = f"/sys/class/net/{INTERFACE}/statistics"
    files = [f"{folder}/{name}" for name in ("tx_bytes", "rx_bytes")]
    sent, received = _command("ip", "netns", "exec", namespace, "cat", *files).split()
    return {"tx_bytes": int(sent), "rx_bytes": int(received)}


def run(
    command: Sequence[str],
    rate: str,
    hosts: int = 2,
    delay: str | None = None,
    report: Path | None = None,
    ranks_per_host: int = 1,
) -> int:
    """Run a command as one rank, or several, on each of `hosts` emulated hosts.

    Args:
        command: Program and arguments, the same on every host; ranks read RANK, WORLD_SIZE, MASTER_ADDR, … as under
            torchrun. OMP_NUM_THREADS is the machine's cores divided by hosts unless it is set.
        rate: Rate of each host's cable in each direction, such as "1gbit".
        hosts: Number of hosts.
        delay: One-way delay a host adds, such as "1ms".
        report: JSON file that receives rate, delay, command, seconds, and per host address, exit status, bytes sent and
            received by its interface while the command ran.
        ranks_per_host: Ranks on each host; what they send each other does not pass the host's interface.

    Returns:
        0, or the exit status of the first host that failed (128 + signal number when a signal ended it).

    Raises:
        LinkUnavailableError: Links cannot be emulated here.
        ValueError: An argument is malformed, or there is no command.
    """
    if ranks_per_host < 1:
        raise ValueError(f"ranks_per_host must be at least 1, got {ranks_per_host}")
    if not command:
        raise ValueError("no command: python -m bench link --rate 1gbit -- COMMAND ...")
    with stop_signals_raise():
        try:
            outcome, traffic = _run(command, rate, hosts, delay, ranks_per_host)
        except StopRequested as stop:  # outside the command's run: while setting up or cleaning up
            _remove_own()
            return 128 + stop.number
    rows = [
        {
            "host": i,
            "address": address(i),
            "exit": max(outcome.exits[i * ranks_per_host : (i + 1) * ranks_per_host]),
            **traffic[i],
        }
        for i in range(hosts)
    ]
    _print_traffic(rows, outcome.wall_s)
    if report is not None:
        content = {"rate": rate, "delay": delay, "command": list(command), "wall_s": outcome.wall_s, "hosts": rows}
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(content, indent=2) + "\n")
    return outcome.status


def _run(
    command: Sequence[str], rate: str, hosts: int, delay: str | None, ranks: int
) -> tuple[Outcome, list[dict[str, int]]]:
    """Set up, run, clean up; the outcome and each host's traffic while the command ran."""
    cable = {record.LINK_RATE: rate, **({record.LINK_DELAY: delay} if delay else {})}
    with emulated_network(hosts, rate, delay) as names:
        before = [interface_bytes(name) for name in names]
        outcome = run_hosts(
            [
                Host(
                    ["ip", "netns", "exec", name, *command],
                    {**rank_environment(i, hosts, local, ranks), **cable},
                    f"rank {i * ranks + local}" if ranks > 1 else f"host {i}",
                )
                for i, name in enumerate(names)
                for local in range(ranks)
            ]
        )
        after = [interface_bytes(name) for name in names]
    return outcome, [{key: b[key] - a[key] for key in a} for a, b in zip(before, after, strict=True)]


def _print_traffic(rows: Sequence[Mapping[str, object]], wall_s: float) -> None:
    for row in rows:
        text = f"host {row['host']} ({row['address']}): exit {row['exit']}"
        print(f"{text}, sent {row['tx_bytes']:,} bytes, received {row['rx_bytes']:,} bytes", file=sys.stderr)
    print(f"{wall_s:.1f} s", file=sys.stderr)


def check() -> str | None:
    """Really create and remove two linked hosts. Returns None when that works, else what is in the way."""
    try:
        with emulated_network(2, "1gbit"):
            return None
    except LinkUnavailableError as error:
        return str(error)
