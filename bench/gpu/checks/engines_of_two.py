"""Every engine that two ranks can be trains over NCCL on two GPUs, and int8 gradients stay near those in fp32."""

from bench.gpu.training import train_all

LIMIT_S, GPUS = 120.0, 2


def run(setting):  # noqa: D103 - see bench.gpu.checks
    return train_all(setting, 2, LIMIT_S)
