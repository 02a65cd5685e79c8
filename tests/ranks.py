"""Real ranks for tests: processes that stay up and share a gloo group, as torchrun would start them.

They are forked from a process that has the large packages imported already, so that every test file can have ranks of
its own. Ranks that serve many files get slow: nothing ends a process group's threads, which wake up all the time.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# what most ranks import, once for all of them
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "lightning.pytorch", "transformers.models.llama.modeling_llama", "strategies"]
)


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _join(rank: int, world_size: int, port: int) -> None:
    # torchrun's variables, so that Lightning recognises an outside launcher and starts no processes of its own
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        CI="true",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


class Ranks:
    """`run(fn, …)` calls fn on every rank at the same time and returns the results in rank order."""

    def __init__(self, world_size: int, fresh: bool = False) -> None:
        """`fresh`: new interpreters, which read the environment variables of now."""
        port, context = free_port(), multiprocessing.get_context("spawn" if fresh else "forkserver")
        self._pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(rank, world_size, port))
            for rank in range(world_size)
        ]

    def start(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        return [pool.submit(fn, *args, **kwargs) for pool in self._pools]

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return [future.result() for future in self.start(fn, *args, **kwargs)]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
