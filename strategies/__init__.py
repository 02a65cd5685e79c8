"""Data-parallel engines with pluggable gradient compression."""

from strategies.compressed_fsdp import CompressedFSDP

__all__ = ["CompressedFSDP"]
