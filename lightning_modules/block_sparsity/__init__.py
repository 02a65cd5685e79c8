"""Block sparsity in three tiers, progressively: dense, two of every four weights, the k best weights of a block."""

from lightning_modules.block_sparsity.module import BlockSparsity
from lightning_modules.block_sparsity.packed_model import load_packed

__all__ = ["BlockSparsity", "load_packed"]
