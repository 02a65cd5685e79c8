"""Models that are used but not trained."""

from typing import Any

import torch
from torch import nn


class Frozen:
    """Holds a model outside of the module that uses it: neither trained, moved, sharded nor saved with it.

    Not an ``nn.Module``, because PyTorch would make the model a submodule of whatever has it as an attribute.

    Args:
        model: Put in evaluation mode; its parameters need no gradients from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)
