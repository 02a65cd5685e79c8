"""Steps of codecs as Triton kernels, for CUDA. Importing this needs the package triton.

Each kernel repeats its step's reference (in ``strategies.compressors``, as torch computes it on a CPU) bit by bit, but
for the sign of zeros and the order of sums: arithmetic in the same order, divisions rounded correctly, multiplications
and additions apart (no fused multiply-add). Magnitudes are compared as integers: they order like floats, NaN above all.

Shape legend: b blocks, B elements of a block, n ranks, NB blocks of one program.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUND = tl.constexpr(12582912.0)  # 1.5·2²³: adding and subtracting it rounds to nearest even below 2²²
_TINY = tl.constexpr(1e-30)
_LOWEST = tl.constexpr(27)  # of NaturalCompression, as the two below
_NONFINITE = tl.constexpr(127)
_INFINITY = tl.constexpr(0x7F800000)
# numbers of which no kernel is made anew where they are odd, or 1; a values' stride is none: rows of 16 bytes are read
# at once only where all are known to begin at multiples of 16
_ANY = ["b", "n", "scale_stride", "mean_stride"]


@triton.jit
def _corrected(grad, owed, at, mask, OWING: tl.constexpr):
    """Gradient, and what is owed, at offsets ``at``; zero where masked."""
    x = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if OWING:
        x += tl.load(owed + at, mask=mask, other=0.0)
    return x


@triton.jit
def _settle(owed, at, mask, left):
    """Keep ``left`` as owed where it is finite; what was there is written back: a mask by element costs wide stores."""
    before = tl.load(owed + at, mask=mask, other=0.0)
    tl.store(owed + at, tl.where(tl.abs(left) < float("inf"), left, before), mask=mask)


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _over(x, levels, NB: tl.constexpr):
    """``levels / x`` as torch has it, ``(1 / x) * levels``, and ``x * (1 / levels)``; ``x [NB]``."""
    one = tl.zeros([NB], tl.float32) + 1.0
    return tl.div_rn(one, tl.where(x < _TINY, _TINY, x)) * levels, x * (1.0 / levels)


@triton.jit(do_not_specialize=_ANY)
def int8_encode(grad, owed, values, scales, b, B: tl.constexpr, NB: tl.constexpr, OWING: tl.constexpr):
    """``Int8`` to nearest: values ``int8 [b, B]``, scales ``float32 [b]``."""
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    at = block[:, None].to(tl.int64) * B + tl.arange(0, B)[None, :]
    mask = (block < b)[:, None]
    x = _corrected(grad, owed, at, mask, OWING)
    amax = tl.max(_magnitude(x), axis=1).to(tl.float32, bitcast=True)
    factor, scale = _over(amax, 127.0, NB)
    q = (x * factor[:, None] + _ROUND) - _ROUND
    tl.store(values + at, q.to(tl.int8), mask=mask)
    tl.store(scales + block, scale, mask=block < b)
    if OWING:
        _settle(owed, at, mask, x - q * scale[:, None])


@triton.jit(do_not_specialize=_ANY)
def int8_mean(out, values, scales, value_stride, scale_stride, share, b, n, B: tl.constexpr, NB: tl.constexpr):
    """Mean of n ranks' ``Int8`` codes; rank r's lie r strides further."""
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    at = block[:, None].to(tl.int64) * B + tl.arange(0, B)[None, :]
    mask = (block < b)[:, None]
    total = tl.zeros([NB, B], tl.float32)
    for rank in range(n):
        here = tl.cast(rank, tl.int64)
        q = tl.load(values + here * value_stride + at, mask=mask, other=0).to(tl.float32)
        scale = tl.load(scales + here * scale_stride + block, mask=block < b, other=0.0)
        total += q * scale[:, None]
    tl.store(out + at, (total * share).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_ANY)
def int4_encode(grad, owed, values, scales, b, B: tl.constexpr, NB: tl.constexpr, OWING: tl.constexpr):
    """``Int4`` to nearest: values ``uint8 [b, B/2]``, the halves of a block as planes, scales ``float32 [b]``."""
    H: tl.constexpr = B // 2
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    column = tl.arange(0, H)[None, :]
    at = block[:, None].to(tl.int64) * B + column
    mask = (block < b)[:, None]
    low = _corrected(grad, owed, at, mask, OWING)
    high = _corrected(grad, owed, at + H, mask, OWING)
    amax = tl.max(tl.maximum(_magnitude(low), _magnitude(high)), axis=1).to(tl.float32, bitcast=True)
    factor, scale = _over(amax, 7.0, NB)
    q_low = (low * factor[:, None] + _ROUND) - _ROUND
    q_high = (high * factor[:, None] + _ROUND) - _ROUND
    byte = (q_low.to(tl.int32) + 8) | ((q_high.to(tl.int32) + 8) << 4)
    tl.store(values + block[:, None].to(tl.int64) * H + column, byte.to(tl.uint8), mask=mask)
    tl.store(scales + block, scale, mask=block < b)
    if OWING:
        _settle(owed, at, mask, low - q_low * scale[:, None])
        _settle(owed, at + H, mask, high - q_high * scale[:, None])


@triton.jit(do_not_specialize=_ANY)
def onebit_encode(grad, owed, values, means, real, b, B: tl.constexpr, NB: tl.constexpr, OWING: tl.constexpr):
    """``OneBit``: values ``uint8 [b, B/8]``, means ``float32 [b, 2]``; ``real [b]`` counts what is no padding."""
    P: tl.constexpr = B // 8
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    inside = block < b
    column = tl.arange(0, P)[None, :]
    at = block[:, None].to(tl.int64) * B + column
    mask = inside[:, None]
    planes = ()
    byte = tl.zeros([NB, P], tl.int32)
    above = tl.zeros([NB, P], tl.int32)
    positive = tl.zeros([NB, P], tl.float32)
    negative = tl.zeros([NB, P], tl.float32)
    for plane in tl.static_range(8):
        x = _corrected(grad, owed, at + plane * P, mask, OWING)
        side = (x.to(tl.int32, bitcast=True) >> 31) + 1
        planes = planes + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
        byte |= side << plane
        above += side
        positive += tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        negative += tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    here = tl.load(real + block, mask=inside, other=0.0)
    count = tl.sum(above, axis=1).to(tl.float32) + (here - B)
    upper = tl.div_rn(tl.sum(positive, axis=1), tl.maximum(count, 1.0))
    lower = tl.div_rn(tl.sum(negative, axis=1), tl.maximum(here - count, 1.0))
    tl.store(values + block[:, None].to(tl.int64) * P + column, byte.to(tl.uint8), mask=mask)
    tl.store(means + 2 * block, upper, mask=inside)
    tl.store(means + 2 * block + 1, lower, mask=inside)
    if OWING:
        for plane in tl.static_range(8):
            share = ((byte >> plane) & 1).to(tl.float32)
            told = share * upper[:, None] + (1.0 - share) * lower[:, None]
            _settle(owed, at + plane * P, mask, planes[plane] - told)


@triton.jit(do_not_specialize=_ANY)
def onebit_mean(out, values, means, value_stride, mean_stride, share, b, n, B: tl.constexpr, NB: tl.constexpr):
    """Mean of n ranks' ``OneBit`` codes; rank r's lie r strides further."""
    P: tl.constexpr = B // 8
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    inside = block < b
    packed = block[:, None].to(tl.int64) * P + tl.arange(0, P)[None, :]
    plane = tl.arange(0, 8)[None, :, None]
    total = tl.zeros([NB, 8, P], tl.float32)
    for rank in range(n):
        here = tl.cast(rank, tl.int64)
        byte = tl.load(values + here * value_stride + packed, mask=inside[:, None], other=0).to(tl.int32)
        upper = tl.load(means + here * mean_stride + 2 * block, mask=inside, other=0.0)[:, None, None]
        lower = tl.load(means + here * mean_stride + 2 * block + 1, mask=inside, other=0.0)[:, None, None]
        side = ((byte[:, None, :] >> plane) & 1).to(tl.float32)
        total += side * upper + (1.0 - side) * lower
    at = block[:, None, None].to(tl.int64) * B + plane * P + tl.arange(0, P)[None, None, :]
    tl.store(out + at, (total * share).to(out.dtype.element_ty), mask=inside[:, None, None])


@triton.jit(do_not_specialize=_ANY)
def natural_encode(first, one, two, grad, owed, values, b, B: tl.constexpr, NB: tl.constexpr, OWING: tl.constexpr):
    """``NaturalCompression``: values ``uint8 [b, B]``; the hash of position and key is ``hashing.hash32``."""
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    at = block[:, None].to(tl.int64) * B + tl.arange(0, B)[None, :]
    mask = (block < b)[:, None]
    x = _corrected(grad, owed, at, mask, OWING)
    mixed = (block[:, None] * B + tl.arange(0, B)[None, :] + tl.load(first)) ^ tl.load(one)
    mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * 0x21F0AAAD
    mixed = ((mixed ^ ((mixed >> 15) & 0x1FFFF)) + tl.load(two)) * 0x735A2D97
    random = mixed ^ ((mixed >> 15) & 0x1FFFF)
    word = x.to(tl.int32, bitcast=True)
    exponent = (tl.minimum(word & 0x7FFFFFFF, _INFINITY) + (random & 0x7FFFFF)) >> 23
    code = tl.minimum(tl.maximum(exponent - _LOWEST, 0), _NONFINITE)
    tl.store(values + at, (code | ((word >> 24) & 0x80)).to(tl.uint8), mask=mask)
    if OWING:
        told = tl.where(code == _NONFINITE, 255, tl.where(code == 0, 0, code + _LOWEST)) << 23
        _settle(owed, at, mask, x - (told | ((word >> 31) << 31)).to(tl.float32, bitcast=True))


Launch = Callable[..., None]
_PROGRAM = 2048  # elements of one program
_LARGEST = 4096  # elements of a block; larger ones spill registers, and 65536 compile for minutes
_OPTIONS: dict[str, Any] = {"num_warps": 2, "enable_fp_fusion": False}


def find(codec: str, step: str, block: int) -> Launch | None:
    """The step of a codec as a launcher called like the step; None where there is no kernel.

    Args:
        codec: "int8", "int4", "onebit" or "natural".
        step: "encode", "owing" or "mean"; see ``BlockSteps``.
        block: Elements of a block; kernels exist for powers of two from 16 to 4096, which registers hold.
    """
    encoders = {"int8": int8_encode, "int4": int4_encode, "onebit": onebit_encode, "natural": natural_encode}
    means = {"int8": int8_mean, "onebit": onebit_mean}
    if not 16 <= block <= _LARGEST or block & (block - 1):
        return None
    if step == "mean" and codec in means:
        return _mean(means[codec], block)
    if step in ("encode", "owing") and codec in encoders:
        return _encoder(encoders[codec], block, step == "owing")
    return None


def blocks_of_program(block: int) -> int:
    """NB for blocks of so many elements."""
    return max(1, _PROGRAM // block)


def _encoder(kernel: Any, block: int, owing: bool) -> Launch:
    blocks = blocks_of_program(block)

    def launch(place: tuple[Tensor, ...] | None, grad: Tensor, *rest: Tensor) -> None:
        owed, codes = (rest[0], rest[1:]) if owing else (grad, rest)
        b = grad.shape[0]
        grid = (triton.cdiv(b, blocks),)
        with torch.cuda.device_of(grad):  # launches go to the current device
            kernel[grid](*(place or ()), grad, owed, *codes, b, B=block, NB=blocks, OWING=owing, **_OPTIONS)

    return launch


def _mean(kernel: Any, block: int) -> Launch:
    blocks = blocks_of_program(block)

    def launch(place: tuple[Tensor, ...] | None, out: Tensor, *codes: Tensor) -> None:
        b, n = out.shape[0], len(codes) // 2
        values, value_stride = _strided(codes[::2])
        scales, scale_stride = _strided(codes[1::2])
        grid = (triton.cdiv(b, blocks),)
        strides = (value_stride, scale_stride)
        with torch.cuda.device_of(out):
            kernel[grid](out, values, scales, *strides, 1 / n, b, n, B=block, NB=blocks, **_OPTIONS)

    return launch


def _strided(parts: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """The first of equal parts, and the elements from one to the next: in a received buffer they are evenly spread."""
    width = parts[0].element_size()
    gaps = {after.data_ptr() - before.data_ptr() for before, after in pairwise(parts)} or {0}
    if len(gaps) > 1 or next(iter(gaps)) % width:
        together = torch.stack(parts)
        return together, together.stride(0)
    return parts[0], next(iter(gaps)) // width
