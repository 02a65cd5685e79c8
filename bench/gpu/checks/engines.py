"""Every engine that one rank can be trains over NCCL on one GPU: its own collectives with a single rank."""

from bench.gpu.training import train_all

LIMIT_S, GPUS = 90.0, 1


def run(setting):  # noqa: D103 - see bench.gpu.checks
    return train_all(setting, 1)
