"""Products with weights that are codes of 4 or 8 bits and scales, as Triton kernels.

A few rows are multiplied by the codes as they are read, so that a product takes as long as reading them; for many rows
`expand` writes the numbers out first. Codes of 4 bits lie two in a byte, the lower half first; of 8 bits they are
unsigned integers, or float8 e4m3. Along the channels a scale and a zero point hold for one group:
weight = (code - zero) * scale.

    int4, int8   unsigned integers
    fp4          float e2m1, taken twice, which makes whole numbers of them; without zero points
    fp8          float8 e4m3; without zero points

Differences code - zero are whole numbers below 256, which bfloat16 and float16 hold exactly, and so do they float8;
scales multiply sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.kernels.jit import jit, multiprocessors, require_triton, tl, triton

MAX_ROWS = 64
"""Rows up to which codes are multiplied as they are read."""
HALVES = ("int4", "fp4")
"""Kinds of codes that lie two in a byte."""
LEAST_BLOCK = 32
"""Channels that share a scale, at least: tensor cores take 16, of every other channel."""


@jit
def _half(codes, zero, KIND: tl.constexpr):
    """Codes of 4 bits -> numbers less the zero point, float32."""
    if KIND == "fp4":
        code = codes.to(tl.int32)
        exponent = (code >> 1) & 3
        fraction = code & 1
        size = tl.where(exponent == 0, fraction, ((fraction + 2) << exponent) >> 1)
        y = tl.where(code >= 8, -size, size).to(tl.float32)
    else:
        y = codes.to(tl.float32) - zero
    return y


@jit
def _decoded(codes, zero, KIND: tl.constexpr):
    """Codes of a byte -> numbers less the zero point, float32."""
    if KIND == "fp8":
        y = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        y = codes.to(tl.float32) - zero
    return y


@jit
def _one_row_kernel(
    x,
    codes,
    scales,
    zeros,
    bias,
    out,
    experts,
    num_outputs,
    x_stride,
    codes_stride,
    out_stride,
    BLOCKS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program BLOCK_N outputs of one row, TOGETHER blocks of BYTES bytes at a time.

    EXPERTS: row r is multiplied by the matrix experts[r] of several that are stacked; -1: it becomes zero.
    """
    groups: tl.constexpr = BLOCKS // PER_GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    asked = n < num_outputs
    used = asked
    if EXPERTS:
        row = tl.program_id(1).to(tl.int64)
        chosen = tl.load(experts + row).to(tl.int64)
        used = asked & (chosen >= 0)
        first = tl.maximum(chosen, 0) * num_outputs
        x += row * x_stride
        out += row * out_stride
        codes += first * codes_stride
        scales += first * groups
        zeros += first * groups
        bias += first
    rows = codes + n.to(tl.int64)[:, None, None] * codes_stride
    sums = tl.zeros([BLOCK_N, TOGETHER, BYTES], tl.float32)
    for start in range(0, BLOCKS, TOGETHER):
        block = start + tl.arange(0, TOGETHER)
        present = block < BLOCKS
        byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        there = used[:, None, None] & present[None, :, None]
        tile = tl.load(rows + byte[None, :, :], mask=there, other=0)
        place = n[:, None] * groups + (block // PER_GROUP)[None, :]
        here = used[:, None] & present[None, :]
        scale = tl.load(scales + place, mask=here, other=0).to(tl.float32)[:, :, None]
        zero = scale
        if KIND == "int4" or KIND == "int8":
            zero = tl.load(zeros + place, mask=here, other=0).to(tl.float32)[:, :, None]
        inside = present[:, None] & (byte >= 0)
        if KIND == "int4" or KIND == "fp4":
            low = tl.load(x + 2 * byte, mask=inside, other=0.0).to(tl.float32)[None, :, :]
            high = tl.load(x + 2 * byte + 1, mask=inside, other=0.0).to(tl.float32)[None, :, :]
            part = _half(tile & 15, zero, KIND) * low + _half(tile >> 4, zero, KIND) * high
        else:
            value = tl.load(x + byte, mask=inside, other=0.0).to(tl.float32)[None, :, :]
            part = _decoded(tile, zero, KIND) * value
        sums += part * scale
    y = tl.sum(tl.sum(sums, 2), 1)
    if BIAS:
        y += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=asked)


@jit
def _few_rows_kernel(
    x,
    codes,
    scales,
    zeros,
    bias,
    out,
    num_rows,
    num_outputs,
    x_stride,
    codes_stride,
    out_stride,
    BLOCKS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program BLOCK_N outputs of all rows: codes [N, K] times x [K, T], one block of BYTES bytes at a time."""
    groups: tl.constexpr = BLOCKS // PER_GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, ROWS)
    used, asked = n < num_outputs, t < num_rows
    rows = codes + n.to(tl.int64)[:, None] * codes_stride
    inputs = x + t.to(tl.int64)[None, :] * x_stride
    dtype: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for block in range(0, BLOCKS):
        byte = block * BYTES + tl.arange(0, BYTES)
        tile = tl.load(rows + byte[None, :], mask=used[:, None], other=0)
        place = n * groups + block // PER_GROUP
        scale = tl.load(scales + place, mask=used, other=0).to(tl.float32)[:, None]
        zero = scale
        if KIND == "int4" or KIND == "int8":
            zero = tl.load(zeros + place, mask=used, other=0).to(tl.float32)[:, None]
        if KIND == "int4" or KIND == "fp4":
            low = tl.load(inputs + 2 * byte[:, None], mask=asked[None, :], other=0.0)
            high = tl.load(inputs + 2 * byte[:, None] + 1, mask=asked[None, :], other=0.0)
            part = tl.dot(_half(tile & 15, zero, KIND).to(dtype), low)
            part = tl.dot(_half(tile >> 4, zero, KIND).to(dtype), high, part)
        else:
            value = tl.load(inputs + byte[:, None], mask=asked[None, :], other=0.0)
            part = tl.dot(_decoded(tile, zero, KIND).to(dtype), value)
        sums += part * scale
    if BIAS:
        sums += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)[:, None]
    place_out = out + t.to(tl.int64)[None, :] * out_stride + n[:, None]
    tl.store(place_out, sums.to(out.dtype.element_ty), mask=used[:, None] & asked[None, :])


@jit
def _expand_kernel(
    codes,
    scales,
    zeros,
    out,
    num_outputs,
    codes_stride,
    out_stride,
    BLOCKS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program one block of BYTES bytes of BLOCK_N rows, as numbers."""
    groups: tl.constexpr = BLOCKS // PER_GROUP
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = (n < num_outputs)[:, None]
    byte = block * BYTES + tl.arange(0, BYTES)
    tile = tl.load(codes + n.to(tl.int64)[:, None] * codes_stride + byte[None, :], mask=used, other=0)
    place = (n * groups + block // PER_GROUP)[:, None]
    scale = tl.load(scales + place, mask=used, other=0).to(tl.float32)
    zero = scale
    if KIND == "int4" or KIND == "int8":
        zero = tl.load(zeros + place, mask=used, other=0).to(tl.float32)
    if KIND == "int4" or KIND == "fp4":
        low = _half(tile & 15, zero, KIND) * scale
        high = _half(tile >> 4, zero, KIND) * scale
        values = tl.interleave(low, high)
        k = block * 2 * BYTES + tl.arange(0, 2 * BYTES)
    else:
        values = _decoded(tile, zero, KIND) * scale
        k = byte
    place_out = out + n.to(tl.int64)[:, None] * out_stride + k[None, :]
    tl.store(place_out, values.to(out.dtype.element_ty), mask=used)


def block_of(group: int) -> int:
    """Channels that a program takes at a time where a scale holds for so many: the largest power of two, up to 128."""
    return min(128, group & -group)


def codes_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *, kind: str
) -> Tensor:
    """x [T, K] times a weight [N, K] of codes -> [T, N], for 1 <= T <= MAX_ROWS; sums in float32, rounded once.

    Args:
        x: bfloat16 or float16, rows contiguous.
        codes: uint8 [N, K / 2] for `int4` and `fp4`, [N, K] for `int8` and `fp8`.
        scales: floats [N, G]; K / G channels share one, of which `block_of` is LEAST_BLOCK at least.
        zeros: integers [N, G]; None for `fp4` and `fp8`.
        bias: [N] or None.
        kind: see the module.
    """
    require_triton()
    tokens, dim = x.shape
    outputs = codes.shape[0]
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if tokens == 0 or outputs == 0:
        return out
    assert tokens <= MAX_ROWS and x.stride(1) == codes.stride(1) == 1 and scales.is_contiguous()
    if tokens == 1:
        _by_rows(x, codes, scales, zeros, bias, out, None, kind)
        return out
    options = {**_blocks(dim, scales, kind), "BIAS": bias is not None, "num_warps": 4}
    tensors = (x, codes, scales, scales if zeros is None else zeros, x if bias is None else bias, out)
    block_n = max(16, _outputs_of_program(outputs, 64, x.device))
    strides = (x.stride(0), codes.stride(0), out.stride(0))
    rows = max(16, triton.next_power_of_2(tokens))
    grid = (triton.cdiv(outputs, block_n),)
    _few_rows_kernel[grid](*tensors, tokens, outputs, *strides, ROWS=rows, BLOCK_N=block_n, num_stages=4, **options)
    return out


def codes_linear_of_experts(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, experts: Tensor, *, kind: str
) -> Tensor:
    """Each row of x [T, K] times one of E weights [N, K] of codes -> [T, N]; as `codes_linear`, of any T.

    Args:
        codes, scales, zeros: of all weights, [E, N, ...] each.
        bias: [E, N] or None.
        experts: integers [T], the weight of each row; -1: none, it becomes zero.
    """
    require_triton()
    out = torch.empty((x.shape[0], codes.shape[1]), dtype=x.dtype, device=x.device)
    if out.numel():
        assert x.stride(1) == 1 and codes.is_contiguous() and scales.is_contiguous()
        of_zeros, of_bias = (None if one is None else one.flatten(0, 1) for one in (zeros, bias))
        _by_rows(x, codes.flatten(0, 1), scales.flatten(0, 1), of_zeros, of_bias, out, experts, kind)
    return out


def _by_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    experts: Tensor | None,
    kind: str,
) -> None:
    """Fill `out` [T, N], a row at a time; `experts` None: T is 1."""
    (rows, outputs), dim = out.shape, x.shape[1]
    options = _blocks(dim, scales, kind)
    block_n = _outputs_of_program(outputs * rows, 8, x.device)
    _one_row_kernel[triton.cdiv(outputs, block_n), rows](
        x,
        codes,
        scales,
        scales if zeros is None else zeros,
        x if bias is None else bias,
        out,
        x if experts is None else experts,
        outputs,
        x.stride(0),
        codes.stride(0),
        out.stride(0),
        **options,
        BIAS=bias is not None,
        EXPERTS=experts is not None,
        BLOCK_N=block_n,
        TOGETHER=min(8, triton.next_power_of_2(options["BLOCKS"])),
        num_warps=4,
    )


def _blocks(dim: int, scales: Tensor, kind: str) -> dict[str, Any]:
    """How kernels go along the channels."""
    block = block_of(dim // scales.shape[1])
    return {
        "BLOCKS": dim // block,
        "PER_GROUP": dim // block // scales.shape[1],
        "KIND": kind,
        "BYTES": block // 2 if kind in HALVES else block,
    }


def _outputs_of_program(outputs: int, most: int, device: torch.device) -> int:
    """A power of two up to `most` that leaves two programs for each multiprocessor, where there is that much."""
    wanted = max(1, outputs // (2 * multiprocessors(device)))
    return min(most, 1 << (wanted.bit_length() - 1))


def expand(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that codes stand for, rounded to a dtype; arguments as `codes_linear`."""
    require_triton()
    outputs, dim = codes.shape[0], codes.shape[1] * (2 if kind in HALVES else 1)
    out = torch.empty((outputs, dim), dtype=dtype, device=codes.device)
    if outputs == 0:
        return out
    blocks = _blocks(dim, scales, kind)
    _expand_kernel[triton.cdiv(outputs, 32), blocks["BLOCKS"]](
        codes,
        scales,
        scales if zeros is None else zeros,
        out,
        outputs,
        codes.stride(0),
        out.stride(0),
        BLOCK_N=32,
        **blocks,
        num_warps=4,
    )
    return out
