"""How the arithmetic of codecs is run. Knows tensors only: no compressor, no engine, no Trainer."""

from strategies.kernels.step import Job, Step, step

__all__ = ["Job", "Step", "step"]
