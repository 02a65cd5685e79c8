"""The product with weights in bands as one Triton kernel, for CUDA. Importing this needs the package triton.

One program makes a band's 16 outputs for one row of the input and keeps its sums in registers: it reads the band's
values one after the other and gathers the input, so it moves the bytes that the tiers need and no more. That can pay
where reading weights is all that counts, for few rows of input; every further row reads the weights again, from cache.

Shape legend: N blocks (or values) of one step, 16 rows, 16 columns of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_modules.block_sparsity.bands import band_product
from lightning_modules.block_sparsity.packing import Layout

BLOCK = 16
ROWS = 16  # of input; with more, as in prefill, bands are expanded once for all of them


@triton.jit
def _columns(columns, at, inside):
    """First column of some blocks."""
    return tl.load(columns + at, mask=inside, other=0).to(tl.int32) * 16


@triton.jit
def _dense(x, columns, values, scales, band, count, N: tl.constexpr, SCALED: tl.constexpr):
    """What a band's dense blocks give, ``[16]``."""
    r = tl.arange(0, 16)
    total = tl.zeros([N, 16, 16], tl.float32)
    for first in range(0, count, N):
        at = first + tl.arange(0, N)
        inside = at < count
        block = band * count + at
        mask = inside[:, None, None]
        here = block[:, None, None] * 256 + r[None, :, None] * 16 + r[None, None, :]
        weight = tl.load(values + here, mask=mask, other=0).to(tl.float32)
        if SCALED:
            scale = tl.load(scales + block[:, None] * 16 + r[None, :], mask=inside[:, None], other=0.0)
            weight *= scale.to(tl.float32)[:, :, None]
        column = _columns(columns, at, inside)
        total += weight * tl.load(x + column[:, None] + r[None, :]).to(tl.float32)[:, None, :]
    return tl.sum(tl.sum(total, axis=0), axis=1)


@triton.jit
def _two_of_four(x, columns, values, codes, scales, band, count, N: tl.constexpr, SCALED: tl.constexpr):
    """What a band's 2:4 blocks give, ``[16]``; of 64 groups a block, i is in a low and i + 32 in a high half-byte."""
    half = tl.arange(0, 2)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    total = tl.zeros([N, 2, 32], tl.float32)
    for first in range(0, count, N):
        at = first + tl.arange(0, N)
        inside = at < count
        mask = inside[:, None, None]
        block = (band * count + at)[:, None]
        code = tl.load(codes + block * 32 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0).to(tl.int32)
        code = code[:, None, :] >> (4 * half)
        group = _columns(columns, at, inside)[:, None, None] + 4 * (byte % 4)
        here = (2 * band * count + at)[:, None, None] * 64 + half * 32 + byte
        one = tl.load(values + here, mask=mask, other=0).to(tl.float32)
        two = tl.load(values + here + count * 64, mask=mask, other=0).to(tl.float32)
        one *= tl.load(x + group + (code & 3)).to(tl.float32)
        two *= tl.load(x + group + ((code >> 2) & 3)).to(tl.float32)
        if SCALED:
            scale = tl.load(scales + block[:, :, None] * 16 + half * 8 + byte // 4, mask=mask, other=0.0)
            total += (one + two) * scale.to(tl.float32)
        else:
            total += one + two
    return tl.sum(tl.reshape(tl.sum(total, axis=0), [16, 4]), axis=1)


@triton.jit
def _topk(x, columns, values, places, scales, band, count, K: tl.constexpr, N: tl.constexpr, SCALED: tl.constexpr):
    """What a band's top-k blocks give, ``[16]``: every value is added to the row it stands in."""
    r = tl.arange(0, 16)[:, None]
    total = tl.zeros([16, N], tl.float32)
    for first in range(0, count * K, N):
        at = first + tl.arange(0, N)
        inside = at < count * K
        here = band * count * K + at
        place = tl.load(places + here, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + here, mask=inside, other=0).to(tl.float32)
        if SCALED:
            value *= tl.load(scales + band * count + at // K, mask=inside, other=0.0).to(tl.float32)
        column = _columns(columns, at // K, inside) + (place & 15)
        value *= tl.load(x + column).to(tl.float32)
        total += tl.where((place >> 4)[None, :] == r, value[None, :], 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def multiply(
    out,
    x,
    columns,
    dense,
    mid,
    mid_index,
    topk,
    topk_index,
    dense_scale,
    mid_scale,
    topk_scale,
    inputs,
    outputs,
    d,
    m,
    t,
    K: tl.constexpr,
    N: tl.constexpr,
    SCALED: tl.constexpr,
):
    """``out [rows, outputs] = x [rows, inputs] · Wᵀ``, one program a band and row; d, m, t: a band's blocks by tier."""
    band = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    x += row * inputs
    columns += band * (d + m + t)
    total = _dense(x, columns, dense, dense_scale, band, d, N, SCALED)
    total += _two_of_four(x, columns + d, mid, mid_index, mid_scale, band, m, N, SCALED)
    total += _topk(x, columns + d + m, topk, topk_index, topk_scale, band, t, K, 16 * N, SCALED)
    at = band * 16 + tl.arange(0, 16)
    tl.store(out + row * outputs + at, total.to(out.dtype.element_ty), mask=at < outputs)


OPTIONS: dict[str, Any] = {"num_warps": 4}
STEP = 8  # blocks


def kernel_product(x: Tensor, parts: dict[str, Tensor], layout: Layout, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias, ``[…, C]`` to ``[…, R]``, in the type of ``x``: by the kernel for few rows, else ``band_product``.

    Args:
        x: Input, on the device of the weights.
        parts: See ``bands.to_bands``.
        layout: The matrix's sizes: blocks of 16, columns in whole blocks.
        bias: ``[R]`` or None.

    Raises:
        ValueError: The matrix has other blocks, or columns that do not fill them.
    """
    if layout.block != BLOCK or layout.columns % BLOCK:
        raise ValueError(
            f"the kernel multiplies matrices in blocks of {BLOCK} that fill all columns, not {layout.columns} columns "
            f"in blocks of {layout.block}: load without it"
        )
    rows = x.reshape(-1, layout.columns).contiguous()
    if len(rows) > ROWS:
        return band_product(x, parts, layout, bias)
    out = torch.empty(len(rows), layout.rows, dtype=x.dtype, device=x.device)
    tiers = ("dense", "mid", "topk")
    scales = [parts.get(f"{tier}.scale", parts[tier]) for tier in tiers]
    counts = [parts[part].shape[1] for part in ("dense", "mid_index", "topk")]
    with torch.cuda.device_of(x):  # launches go to the current device
        multiply[(len(parts["columns"]), len(rows))](
            out,
            rows,
            *(parts[part] for part in ("columns", "dense", "mid", "mid_index", "topk", "topk_index")),
            *scales,
            layout.columns,
            layout.rows,
            *counts,
            K=layout.k,
            N=STEP,
            SCALED="dense.scale" in parts,
            **OPTIONS,
        )
    found = out if bias is None else out + bias
    return found.view(*x.shape[:-1], layout.rows)
