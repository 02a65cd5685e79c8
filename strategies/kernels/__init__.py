"""How the arithmetic of codecs is run. Knows tensors only: no compressor, no engine, no Trainer."""

from strategies.kernels.step import Choice, Job, Step, choose, step

__all__ = ["Choice", "Job", "Step", "choose", "step"]
