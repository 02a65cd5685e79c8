"""Several small codes in a byte, planar: byte c of a block holds element c of each of the block's planes.

Neighbouring elements go to neighbouring bytes, so packing is a few whole-row shifts instead of a reduction over an
inner dimension of eight, which is hundreds of times slower when compiled for a CPU (measured).
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``int32 [b, B]`` codes in [0, 2^bits) into ``uint8 [b, B·bits/8]``; ``bits`` is 1, 2, 4 or 8."""
    planes = codes.view(codes.shape[0], 8 // bits, -1)
    packed = planes[:, 0]
    for plane in range(1, 8 // bits):
        packed = packed | (planes[:, plane] << (plane * bits))
    return packed.to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """``uint8 [b, W]`` back to ``int32 [b, W·8/bits]``; the inverse of ``pack``."""
    wide, mask = packed.to(torch.int32), (1 << bits) - 1
    return torch.cat([(wide >> (plane * bits)) & mask for plane in range(8 // bits)], 1)


def split_bytes(numbers: Tensor, width: int) -> Tensor:
    """Non-negative ``int64 [b, k]`` as ``uint8 [b, width·k]``, lowest bytes first (gloo has no 16-bit integers)."""
    return torch.cat([((numbers >> (8 * byte)) & 255).to(torch.uint8) for byte in range(width)], 1)


def join_bytes(parts: Tensor, width: int) -> Tensor:
    """``uint8 [b, width·k]`` back to ``int64 [b, k]``; the inverse of ``split_bytes``."""
    pieces = parts.to(torch.int64).view(parts.shape[0], width, -1)
    numbers = pieces[:, 0]
    for byte in range(1, width):
        numbers = numbers | (pieces[:, byte] << (8 * byte))
    return numbers
