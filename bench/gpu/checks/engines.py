"""Every engine that one rank can be trains over NCCL on one GPU: a single rank, which exchanges no gradients."""

from bench.gpu.training import train_all

LIMIT_S, GPUS = 120.0, 1


def run(setting):  # noqa: D103 - see bench.gpu.checks
    return train_all(setting, 1, LIMIT_S)
