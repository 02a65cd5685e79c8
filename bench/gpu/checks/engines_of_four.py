"""Every engine trains over NCCL on four GPUs, replicas that shard a model among them."""

from bench.gpu.training import train_all

LIMIT_S, GPUS = 180.0, 4


def run(setting):  # noqa: D103 - see bench.gpu.checks
    return train_all(setting, 4, LIMIT_S)
