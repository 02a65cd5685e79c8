"""Random numbers that are a function of (key, position): the same on every backend, in any order, with no generator.

A compressor must not touch torch's global generator, which belongs to dropout and to the order of data, and a resumed
run must draw what the uninterrupted one would have drawn. A hash of the position gives both.
"""

import zlib

import torch
from torch import Tensor

from strategies.units import Unit

_MASK = (1 << 64) - 1


def splitmix(*parts: int) -> tuple[int, int]:
    """A 64-bit key of integers (seed, step, unit, rank, …), on the host, as two signed 32-bit halves.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once per part.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return _signed(state & 0xFFFFFFFF), _signed(state >> 32)


def unit_key(unit: Unit, purpose: str = "", *, shared: bool = False) -> tuple[int, int]:
    """A key for ``unit``: differs by seed, step, unit and purpose, and by rank unless ``shared``."""
    rank = 0 if shared else 1 + unit.rank
    return splitmix(unit.seed, unit.step, zlib.crc32(f"{unit.name}/{unit.part}/{purpose}".encode()), rank)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def hash32(position: Tensor, key: tuple[int, int] | tuple[Tensor, Tensor]) -> Tensor:
    """32 random bits for every ``position`` (int32, wraps), as int32; a key of numbers or int32 scalars."""
    mixed = position ^ key[0]
    mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * 0x21F0AAAD
    mixed = ((mixed ^ ((mixed >> 15) & 0x1FFFF)) + key[1]) * 0x735A2D97
    return mixed ^ ((mixed >> 15) & 0x1FFFF)


def random_bits(first: int, shape: torch.Size, key: tuple[int, int], device: torch.device) -> Tensor:
    """32 random bits (int32) for the positions ``first, first + 1, …`` laid out in ``shape``, row by row."""
    start = (first + (1 << 31)) % (1 << 32) - (1 << 31)
    count = shape.numel()
    position = torch.arange(count, dtype=torch.int32, device=device)
    return hash32((position + start).view(shape), key)


def uniform(first: int, shape: torch.Size, key: tuple[int, int], device: torch.device) -> Tensor:
    """float32 in [0, 1) with 24 random bits, for consecutive positions; see ``random_bits``."""
    return to_uniform(random_bits(first, shape, key, device))


def to_uniform(bits: Tensor) -> Tensor:
    """The low 24 of random ``bits`` as float32 in [0, 1)."""
    return (bits & 0xFFFFFF).float() * 2.0**-24
