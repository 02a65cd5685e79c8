"""Two gloo processes train a small FSDP1 model on CPU; each writes a profiler trace of three steps. Run by a test."""

import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

UNITS = 3


def train(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # FSDP1 still calls collectives that torch 2.13 renames
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = FullyShardedDataParallel(
        nn.Sequential(*[nn.Linear(64, 64) for _ in range(UNITS)]),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def save(profiler):
        profiler.export_chrome_trace(f"{folder}/rank{rank}.json" + (".gz" if rank else ""))

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as profiler:
        for _ in range(4):
            loss = model(torch.randn(8, 64)).pow(2).sum()
            loss.backward()
            value = loss.detach()
            dist.all_reduce(value)
            dist.broadcast(value, 0)
            received = torch.empty(2)
            dist.all_to_all_single(received, torch.ones(2))
            (dist.send if rank == 0 else dist.recv)(received, 1 - rank)
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, args=(sys.argv[1],), nprocs=2)
