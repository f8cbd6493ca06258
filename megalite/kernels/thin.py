"""Linear layers of few rows on CUDA: products that take as long as reading the weight, as Triton kernels.

The norm before the product and the bias, the gate and the residual after it are part of the kernel; sums are in float32
and rounded once. A norm's factor 1/rms is the same for all channels of a row, so it multiplies the sums
and x is read once. One row is multiplied element by element (a matrix-vector product), more rows as tensor core tiles
whose channels are shared out over the warps. Tiles are chosen from shapes and from the number of multiprocessors only.

With programmatic dependent launch (`pdl`) a kernel starts while the one before still runs: it asks for its first
weights, which nothing in a step writes, and only then waits for the kernels before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, multiprocessors, next_power_of_2, require_triton, tl

MAX_ROWS = 8
"""Rows up to which these kernels are meant: measured as fast as cuBLAS with norm and gate apart, with more slower."""
LINE = 128
"""Bytes that one prefetch brings into the L2 cache."""


@jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu, gelu or gelu_tanh of a tile in float32."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # x (1 + tanh u) / 2 = x sigmoid(2 u)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@jit
def _prefetch(weight, start, end, LINES: tl.constexpr):
    """Bring elements start..end of the weight, LINES lines of the L2 cache at most, into it."""
    step: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # elements of a line
    element = tl.minimum(start + tl.arange(0, LINES) * step, end - 1)
    address = (weight + element).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def _depend(weight, n, num_outputs, weight_stride, LINES: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for this program's first weights, let the next kernel start, wait for the kernels before."""
    if LINES > 0:
        start = n.to(tl.int64) * weight_stride
        size = tl.minimum(num_outputs - n, BLOCK_N).to(tl.int64) * weight_stride
        _prefetch(weight, start, start + size, LINES)
        if PAIRED:
            start += num_outputs.to(tl.int64) * weight_stride
            _prefetch(weight, start, start + size, LINES)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@jit
def _normed(x, norm_weight, channel, present, ZERO_CENTRED: tl.constexpr):
    """x times the norm's weight, without its factor 1/rms."""
    weight = tl.load(norm_weight + channel, mask=present, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        weight += 1.0
    return x * weight


@jit
def _input(x, norm_weight, channel, DIM: tl.constexpr, NORM: tl.constexpr, ZERO_CENTRED: tl.constexpr):
    """Channels of the row at x after the norm (but for 1/rms), and their squares before; float32."""
    present = channel < DIM
    value = tl.load(x + channel, mask=present, other=0.0).to(tl.float32)
    square = value * value
    if NORM:
        value = _normed(value, norm_weight, channel, present, ZERO_CENTRED)
    return value, square


@jit
def _one_row_kernel(
    x,
    weight,
    out,
    bias,
    residual,
    norm_weight,
    num_outputs,
    weight_stride,
    eps,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    PAIRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program BLOCK_N outputs of the only row; each thread sums its own channels. The next tile of the weight and
    of x is under way while one is multiplied."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    used = (n < num_outputs)[:, None]
    rows = weight + n.to(tl.int64)[:, None] * weight_stride + k[None, :]
    up_rows = rows + num_outputs.to(tl.int64) * weight_stride
    tile = tl.load(rows, mask=used & (k < DIM)[None, :], other=0.0)
    up_tile = tile
    if PAIRED:
        up_tile = tl.load(up_rows, mask=used & (k < DIM)[None, :], other=0.0)
    if PDL:
        _depend(weight, first, num_outputs, weight_stride, LINES, PAIRED, BLOCK_N)
    value, squares = _input(x, norm_weight, k, DIM, NORM, ZERO_CENTRED)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(BLOCK_K, DIM, BLOCK_K):
        there = used & (start + k < DIM)[None, :]
        next_tile = tl.load(rows + start, mask=there, other=0.0)
        next_up = next_tile
        if PAIRED:
            next_up = tl.load(up_rows + start, mask=there, other=0.0)
        next_value, square = _input(x, norm_weight, start + k, DIM, NORM, ZERO_CENTRED)
        sums += tile.to(tl.float32) * value[None, :]
        if PAIRED:
            up_sums += up_tile.to(tl.float32) * value[None, :]
        squares += square
        tile = next_tile
        up_tile = next_up
        value = next_value
    y = tl.sum(sums + tile.to(tl.float32) * value[None, :], 1)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / DIM + eps)
        y *= factor
    mask = n < num_outputs
    if BIAS:
        y += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    if PAIRED:
        up = tl.sum(up_sums + up_tile.to(tl.float32) * value[None, :], 1) * factor
        if BIAS:
            up += tl.load(bias + num_outputs + n, mask=mask, other=0.0).to(tl.float32)
        y = activated(y, ACTIVATION) * up
    if RESIDUAL:
        y += tl.load(residual + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=mask)


@jit
def _few_rows_kernel(
    x,
    weight,
    out,
    bias,
    residual,
    norm_weight,
    num_rows,
    num_outputs,
    x_stride,
    weight_stride,
    out_stride,
    residual_stride,
    eps,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    PAIRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE_K: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program BLOCK_N outputs of all rows: weight [S, N, K] times x [S, K, T], S slices of the channels at a time,
    each summed by warps of its own; the slices are added at the end."""
    first = tl.program_id(0) * BLOCK_N
    if PDL:
        _depend(weight, first, num_outputs, weight_stride, LINES, PAIRED, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    t = tl.arange(0, ROWS)
    k = tl.arange(0, SLICES)[:, None] * SLICE_K + tl.arange(0, SLICE_K)[None, :]
    rows = weight + n.to(tl.int64)[None, :, None] * weight_stride + k[:, None, :]
    up_rows = rows + num_outputs.to(tl.int64) * weight_stride
    inputs = x + t[None, None, :] * x_stride + k[:, :, None]
    present_n = (n < num_outputs)[None, :, None]
    present_t = (t < num_rows)[None, None, :]
    # float16 can't hold x times the norm's weight of every model: its rows are scaled first.
    SCALED_FIRST: tl.constexpr = NORM and x.dtype.element_ty == tl.float16
    squares = tl.zeros([SLICES, SLICE_K, ROWS], tl.float32)
    if SCALED_FIRST:
        for start in range(0, DIM, SLICES * SLICE_K):
            there = present_t & (start + k < DIM)[:, :, None]
            value = tl.load(inputs + start, mask=there, other=0.0).to(tl.float32)
            squares += value * value
    factor = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / DIM + eps)  # [ROWS]
    sums = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    up_sums = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    for start in range(0, DIM, SLICES * SLICE_K):
        present_k = start + k < DIM
        there = present_n & present_k[:, None, :]
        tile = tl.load(rows + start, mask=there, other=0.0)
        input_there = present_t & present_k[:, :, None]
        value = tl.load(inputs + start, mask=input_there, other=0.0)
        if NORM:
            wide = value.to(tl.float32)
            if SCALED_FIRST:
                wide *= factor[None, None, :]
            else:
                squares += wide * wide
            channel = (start + k)[:, :, None]
            value = _normed(wide, norm_weight, channel, present_k[:, :, None], ZERO_CENTRED).to(x.dtype.element_ty)
        sums = tl.dot(tile, value, sums)
        if PAIRED:
            up_tile = tl.load(up_rows + start, mask=there, other=0.0)
            up_sums = tl.dot(up_tile, value, up_sums)
    y = tl.sum(sums, 0)  # [BLOCK_N, ROWS]
    up = tl.sum(up_sums, 0)
    if NORM and not SCALED_FIRST:
        factor = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / DIM + eps)
        y *= factor[None, :]
        up *= factor[None, :]
    mask = (n < num_outputs)[:, None] & (t < num_rows)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=n < num_outputs, other=0.0).to(tl.float32)[:, None]
    if PAIRED:
        if BIAS:
            up += tl.load(bias + num_outputs + n, mask=n < num_outputs, other=0.0).to(tl.float32)[:, None]
        y = activated(y, ACTIVATION) * up
    if RESIDUAL:
        place = residual + t[None, :] * residual_stride + n[:, None]
        y += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t[None, :] * out_stride + n[:, None], y.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut: outputs and channels of a program's tile, and how it is compiled."""

    block_n: int
    block_k: int
    slices: int
    """Parts of block_k that have warps of their own; the kernel of one row has no such parts."""
    num_warps: int
    num_stages: int
    lines: int
    """Lines of the L2 cache that a program asks for before it waits, of each weight (the upper half counts too)."""


def thin_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float, bool] | None = None,
    gated: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x [T, K] @ weight [N, K]^T -> [T, N] for a few rows (1 <= T <= MAX_ROWS); sums in float32, rounded once.

    `norm` (weight [K], eps, zero_centred): RMSNorm of x first, with the weight plus one where zero_centred. `gated`, an
    activation (silu, gelu, gelu_tanh): the weight is [2 N, K] = [gate; up] and act(gate) * up of the two products is
    the result. Then bias ([N], or [2 N] under `gated`: before the activation) and `residual` [T, N] are added. All of
    one dtype (bfloat16 or float16; float32 for one row only: it has no tensor cores), last dims contiguous. `out` may
    be `residual` itself (a program reads and writes its own outputs only) but must not overlap x.

    A row's result depends on that row, the weight, N, K and the kind of device; not on T where T is 2 or more (the one
    of T = 1 may differ from it in the last bits). `pdl`: launched as dependent on the kernel before (compute capability
    9.0 on): the weight is read before that kernel has ended, so that kernel must not write it, and every kernel of such
    a chain must wait before it touches what others write. `tile`: for measurements; None: chosen from N, K and device.
    """
    require_triton()
    tokens, dim = x.shape[0], weight.shape[1]
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert tokens <= MAX_ROWS and x.shape[1] == dim, (x.shape, weight.shape)
    assert tokens <= 1 or x.dtype.itemsize == 2, x.dtype
    assert x.stride(1) == weight.stride(1) == 1, (x.stride(), weight.stride())
    if out is None:
        out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if tokens == 0 or outputs == 0:
        return out
    assert out.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    norm_weight, eps, zero_centred = norm or (None, 1.0, False)
    tile = tile or tile_of(tokens, outputs, dim, bool(gated), x)
    tensors = (x, weight, out, *(x if tensor is None else tensor for tensor in (bias, residual, norm_weight)))
    options = {
        "DIM": dim,
        "NORM": norm is not None,
        "ZERO_CENTRED": zero_centred,
        "PAIRED": gated is not None,
        "ACTIVATION": gated or "",
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "BLOCK_N": tile.block_n,
        "LINES": tile.lines if pdl else 0,
        "PDL": pdl,
        "num_warps": tile.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    grid = (cdiv(outputs, tile.block_n),)
    if tokens == 1:
        _one_row_kernel[grid](*tensors, outputs, weight.stride(0), eps, BLOCK_K=tile.block_k, **options)
        return out
    strides = (x.stride(0), weight.stride(0), out.stride(0), 0 if residual is None else residual.stride(0))
    _few_rows_kernel[grid](
        *tensors[:6],
        tokens,
        outputs,
        *strides,
        eps,
        ROWS=max(8, next_power_of_2(tokens)),
        SLICES=tile.slices,
        SLICE_K=tile.block_k // tile.slices,
        num_stages=tile.num_stages,
        **options,
    )
    return out


def tile_of(tokens: int, outputs: int, dim: int, paired: bool, x: Tensor) -> Tile:
    """The tile of a product; for two rows and more the same for any number of them."""
    processors = multiprocessors(x.device)
    if tokens == 1 and dim % 2048 == 0 and dim >= 4096:
        block_n = 4 if dim == 4096 else 2
        return Tile(block_n, 2048, 1, 4 if block_n == 4 else 8, 1, 0)
    if tokens == 1:
        block_k = min(1024, max(32, next_power_of_2(dim)))
        block_n = _outputs_of_program(outputs, 4 if paired else 8, processors)
        rest = block_n * (dim - min(dim, block_k)) * x.element_size() // LINE
        lines = min(256, next_power_of_2(rest)) if rest else 0
        return Tile(block_n, block_k, 1, max(1, block_k // 256), 1, lines)
    block_n = max(16, _outputs_of_program(outputs, 16 if paired else 32, processors))
    lines = min(256, next_power_of_2(max(1, block_n * dim * x.element_size() // LINE)))
    slices = min(4, max(1, next_power_of_2(dim) // 64))
    return Tile(block_n, 64 * slices, slices, 4, 3, lines)


def _outputs_of_program(outputs: int, most: int, processors: int) -> int:
    """A power of two up to `most` that leaves two programs for each multiprocessor, where there is that much."""
    wanted = max(1, outputs // (2 * processors))
    return min(most, 1 << (wanted.bit_length() - 1))
