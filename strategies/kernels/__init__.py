"""How the arithmetic of codecs is run. Knows tensors only: no compressor, no engine, no Trainer."""

import importlib
import logging
from collections.abc import Callable

from strategies.kernels.step import Choice, Job, choose, faster

__all__ = ["Choice", "Job", "choose", "faster", "triton_kernel"]


def triton_kernel(codec: str, step: str, block: int) -> Callable[..., None] | None:
    """A step as a Triton kernel; None where there is none, or no triton. See ``triton_codecs.find``."""
    try:
        found: Callable[..., None] | None = importlib.import_module(f"{__name__}.triton_codecs").find(
            codec, step, block
        )
    except ImportError as error:
        logging.getLogger(__name__).warning("no Triton kernels: %s; pip install -e '.[triton]'", error)
        return None
    return found
