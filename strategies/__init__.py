"""Data-parallel engines with pluggable gradient compression."""

from strategies.compressed_ddp import CompressedDDP
from strategies.compressed_diloco import CompressedDiLoCo
from strategies.compressed_fsdp import CompressedFSDP
from strategies.compressed_fsdp2 import CompressedFSDP2
from strategies.sharded_diloco import ShardedDiLoCo

__all__ = ["CompressedDDP", "CompressedDiLoCo", "CompressedFSDP", "CompressedFSDP2", "ShardedDiLoCo"]
