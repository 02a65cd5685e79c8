"""Real ranks for tests: processes that stay up and share a gloo group, as torchrun would start them.

They are forked from a process that has everything imported already, so that every test file can have ranks of its own.
"""

import gc
import io
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Processes start with what is imported once for all of them.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["callbacks.command_line", "transformers.models.llama.modeling_llama", "pytest"])
_ANEW, _PATIENCE = 10, timedelta(seconds=60)  # calls after which ranks meet anew; how long they wait for each other
_this: "_Rank"


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class _Rank:
    """What a process of `Ranks` knows of itself."""

    def __init__(self, rank: int, world_size: int, port: int, environment: Mapping[str, str]) -> None:
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
            **environment,
        )
        torch.set_num_threads(1)
        gc.freeze()  # what is imported stays: collections need not look through it
        self.place = {"rank": rank, "world_size": world_size}
        self.store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=_PATIENCE)
        self.calls = 0

    def meet(self) -> None:
        """Join the other ranks before a call; every so often anew.

        Nothing else ends the process groups that trainers make: each has threads, which wake up all the time.
        """
        if self.calls % _ANEW == 0:
            if dist.is_initialized():
                dist.destroy_process_group()
                gc.collect()  # threads end with the last reference to their group
            store = dist.PrefixStore(str(self.calls), self.store)  # addresses of before are of no use
            dist.init_process_group("gloo", store=store, timeout=_PATIENCE, **self.place)
        self.calls += 1


def _end_with_the_tests() -> None:
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)


def _join(*arguments: Any) -> None:
    global _this
    threading.Thread(target=_end_with_the_tests, name="tests-watch", daemon=True).start()  # also when they are killed
    _this = _Rank(*arguments)


def _call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    """The result as bytes: a process would hand over each of its tensors through a connection and a file of its own."""
    _this.meet()
    result = io.BytesIO()
    torch.save(fn(*args, **kwargs), result)
    return result.getvalue()


class Ranks:
    """`run(fn, …)` calls fn on every rank at the same time and returns the results in rank order."""

    def __init__(self, world_size: int, **environment: str) -> None:
        """`environment`: variables that they have besides."""
        port = free_port()
        self._pools = [
            ProcessPoolExecutor(1, FORKED, initializer=_join, initargs=(rank, world_size, port, environment))
            for rank in range(world_size)
        ]

    def start(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[bytes]]:
        """Begin to call fn on every rank; `end` gives the results."""
        return [pool.submit(_call, fn, *args, **kwargs) for pool in self._pools]

    def end(self, started: list[Future[bytes]]) -> list[Any]:
        # any object, as from any process pool: of processes that these tests have started
        return [torch.load(io.BytesIO(future.result()), weights_only=False) for future in started]

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return self.end(self.start(fn, *args, **kwargs))

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
