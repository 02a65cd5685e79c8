"""Several small codes in a byte, planar: byte c of a block holds element c of each of the block's planes.

Neighbouring elements go to neighbouring bytes, so packing is a few whole-row operations instead of a reduction over an
inner dimension of eight, which is hundreds of times slower when compiled for a CPU (measured). Codes are whole numbers
in float32, as they come from rounding: bytes are exact in it, and one conversion at the end is cheaper than one per
element.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``float32 [b, B]`` codes in [0, 2^bits) into whole numbers ``float32 [b, B·bits/8]`` up to 255."""
    planes = codes.view(codes.shape[0], 8 // bits, -1)
    packed = planes[:, -1]
    for plane in range(8 // bits - 2, -1, -1):
        packed = packed * (1 << bits) + planes[:, plane]
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """``uint8 [b, W]`` back to ``int32 [b, W·8/bits]``; the inverse of ``pack``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device).view(1, -1, 1)
    planes = (packed.to(torch.int32)[:, None] >> shifts) & ((1 << bits) - 1)
    return planes.view(packed.shape[0], -1)


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
