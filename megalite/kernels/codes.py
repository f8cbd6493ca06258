"""Products with weights that are codes of 4 or 8 bits and scales, as Triton kernels.

A few rows are multiplied by the codes as they are read, so that a product takes as long as reading them; for many rows
`expand` writes the numbers out first. Along the channels a scale and a zero point hold for one group: weight =
(code - zero) * scale.

    int4, int8   unsigned integers
    fp4          float e2m1, taken twice, which makes whole numbers of them; without zero points
    fp8          float8 e4m3; without zero points

Codes of 8 bits are in the order of their channels. Codes of 4 bits lie two in a byte: within a block of `block_of`
channels, byte b holds channel b in its lower half and channel b + block / 2 in its upper half. So either half of the
bytes meets channels that lie side by side, and a scale holds for a whole block.

A code becomes a float32 by its bits, without a conversion, of which a multiprocessor makes few. Of four bytes in an
int32, an integer is left where it lies, or 16 bits lower, as the fraction of a float32 without an exponent: code *
2**(place - 149). A float keeps its sign, exponent and fraction, which gives it times 2**-EXPONENTS. Differences code -
zero are whole numbers below 256, which bfloat16 and float16 hold exactly, and so do they float8; scales multiply sums
in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, launches_dependents, multiprocessors, next_power_of_2, require_triton, tl

ROW_WORDS = {4: 256, 8: 512}
"""By bits of a code: words of a row that a program multiplies at a time, four to a thread."""
MAX_ROWS = 64
"""Rows up to which codes are multiplied as they are read."""
HALVES = ("int4", "fp4")
"""Kinds of codes of 4 bits; the others have 8."""
EXPONENTS = {"int4": 149, "int8": 149, "fp4": 127, "fp8": 120}
"""The numbers that bits make are 2 to this too small: the exponents of float32 are biased by 127, of fp8 by 7, of fp4,
which is taken twice, by 0; and the lowest bit of a float32's fraction is worth 2**-149."""
LEAST_BLOCK = 32
"""Channels that share a scale, at least: tensor cores take 16 at a time, and half a block's are side by side."""


@jit
def _number(words, CODE: tl.constexpr, KIND: tl.constexpr):
    """One of the codes of each int32 -> float32: an integer times 2**(place - 149), a float times 2**-EXPONENTS."""
    if KIND == "int4":
        bits = words & (15 << 4 * CODE) if CODE < 5 else (words >> 16) & (15 << 4 * CODE - 16)
    elif KIND == "int8":
        bits = words & (255 << 8 * CODE) if CODE < 2 else (words >> 16) & (255 << 8 * CODE - 16)
    elif KIND == "fp4":  # 0x81C00000, as a signed number
        bits = ((words << 28 - 4 * CODE) >> 6) & -0x7E400000
    else:  # 0x87F00000
        bits = ((words << 24 - 8 * CODE) >> 4) & -0x78100000
    return bits.to(tl.float32, bitcast=True)


@jit
def _lifted(x, CODE: tl.constexpr, KIND: tl.constexpr):
    """What multiplies one of the codes, below 2**31, 2**96 greater: products would else be too small for a float32."""
    if KIND == "int4" or KIND == "int8":
        BITS: tl.constexpr = 4 if KIND == "int4" else 8
        PLACE: tl.constexpr = BITS * CODE % 16 if BITS * (CODE + 1) > 23 else BITS * CODE
        y = x * 2.0 ** (96 - PLACE)
    else:
        y = x * 2.0**96
    return y


@jit
def _value(byte, CODE: tl.constexpr, zero, KIND: tl.constexpr, EXPONENT: tl.constexpr):
    """One of the codes of a byte, in an int32, less the zero point, exactly; float32."""
    y = _number(byte, CODE, KIND)
    if KIND == "int4" or KIND == "int8":
        y = (y.to(tl.int32, bitcast=True) | 0x4B000000).to(tl.float32, bitcast=True)  # 2**23 + code * 2**place
        y = y * 2.0 ** (-4 * CODE) - (zero + 2.0 ** (23 - 4 * CODE))
    else:
        y *= 2.0**EXPONENT
    return y


@jit
def _scale_and_zero(scales, zeros, place, mask, KIND: tl.constexpr):
    """Of the groups at `place`, as float32; floats have no zero points."""
    scale = tl.load(scales + place, mask=mask, other=0).to(tl.float32)
    zero = scale
    if KIND == "int4" or KIND == "int8":
        zero = tl.load(zeros + place, mask=mask, other=0).to(tl.float32)
    return scale, zero


@jit
def _fours(
    x, start, WORDS: tl.constexpr, DIM: tl.constexpr, HALVED: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """The channels that the codes of WORDS words from `start` on meet, those of one half of the bytes: four tensors
    [WORDS], of each byte of a word, float32."""
    byte = start * 4 + tl.arange(0, 4 * WORDS)
    channel = byte
    if HALVED:
        channel = byte // (BLOCK // 2) * BLOCK + byte % (BLOCK // 2) + HALF * (BLOCK // 2)
    values = tl.load(x + channel, mask=channel < DIM, other=0.0)
    even, odd = values.reshape([WORDS, 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32)


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
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program BLOCK_N outputs of one row, WORDS times four bytes at a time; the next words are under way while some
    are multiplied.

    A thread reads eight channels side by side and the two words that meet them: none needs what another has read.
    EXPERTS: row r is multiplied by the matrix experts[r] of several that are stacked; -1: it becomes zero.
    """
    HALVED: tl.constexpr = KIND == "int4" or KIND == "fp4"
    INTEGER: tl.constexpr = KIND == "int4" or KIND == "int8"
    HALVES: tl.constexpr = 2 if HALVED else 1
    NUM_WORDS: tl.constexpr = DIM // 8 if HALVED else DIM // 4
    GROUPS: tl.constexpr = DIM // BLOCK // PER_GROUP
    IN_GROUP: tl.constexpr = NUM_WORDS // GROUPS
    asked = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(asked, num_outputs - 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    chosen = 0
    if EXPERTS:
        row = tl.program_id(1).to(tl.int64)
        chosen = tl.load(experts + row)
        first = tl.maximum(chosen, 0).to(tl.int64) * num_outputs
        x += row * x_stride
        out += row * out_stride
        codes += first * codes_stride
        scales += first * GROUPS
        zeros += first * GROUPS
        bias += first
    word = tl.max_contiguous(tl.arange(0, WORDS), 2)
    rows = codes.to(tl.pointer_type(tl.int32)) + n.to(tl.int64)[None, :] * (codes_stride // 4) + word[:, None]
    tile = tl.load(rows, mask=(word < NUM_WORDS)[:, None], other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([WORDS // 2, BLOCK_N], tl.float32)
    for start in range(0, NUM_WORDS, WORDS):
        next_tile = tl.load(rows + start + WORDS, mask=(start + WORDS + word < NUM_WORDS)[:, None], other=0)
        pair = start + 2 * tl.arange(0, WORDS // 2)
        group = n[None, :] * GROUPS + (pair // IN_GROUP)[:, None]
        scale, zero = _scale_and_zero(scales, zeros, group, (pair < NUM_WORDS)[:, None], KIND)
        part = tl.zeros([WORDS, BLOCK_N], tl.float32)
        total = tl.zeros([WORDS], tl.float32)
        for half in tl.static_range(HALVES):
            four = _fours(x, start, WORDS, DIM, HALVED, BLOCK, half)
            for byte in tl.static_range(4):
                value = four[byte]
                total += value
                part += _number(tile, byte * HALVES + half, KIND) * _lifted(value, byte * HALVES + half, KIND)[:, None]
        mine = tl.sum(part.reshape([WORDS // 2, 2, BLOCK_N]), 1)
        if INTEGER:
            mine -= zero * tl.sum(total.reshape([WORDS // 2, 2]), 1)[:, None] * 2.0 ** (96 - EXPONENT)
        sums += mine * scale
        tile = next_tile
    y = tl.sum(sums, 0) * 2.0 ** (EXPONENT - 96)
    if BIAS:
        y += tl.load(bias + n).to(tl.float32)
    if EXPERTS:
        y = tl.where(chosen >= 0, y, 0.0)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=asked < num_outputs)


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
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One program BLOCK_N outputs of all rows: codes [S, N, K] times x [S, K, T], S blocks of BYTES bytes at a time,
    each summed by warps of its own; the slices are added at the end."""
    HALVED: tl.constexpr = KIND == "int4" or KIND == "fp4"
    BLOCKS: tl.constexpr = DIM // BLOCK
    BYTES: tl.constexpr = BLOCK // 2 if HALVED else BLOCK
    groups: tl.constexpr = BLOCKS // PER_GROUP
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, ROWS)
    used, asked = n < num_outputs, t < num_rows
    block = tl.arange(0, SLICES)
    byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    channel = block[:, None] * BLOCK + tl.arange(0, BYTES)[None, :]
    rows = codes + n.to(tl.int64)[None, :, None] * codes_stride + byte[:, None, :]
    inputs = x + t.to(tl.int64)[None, None, :] * x_stride + channel[:, :, None]
    sums = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    for start in range(0, BLOCKS, SLICES):
        present = start + block < BLOCKS
        there = present[:, None] & used[None, :]
        tile = tl.load(rows + start * BYTES, mask=there[:, :, None], other=0).to(tl.int32)
        group = n[None, :] * groups + ((start + block) // PER_GROUP)[:, None]
        scale, zero = _scale_and_zero(scales, zeros, group, there, KIND)
        here = present[:, None, None] & asked[None, None, :]
        if HALVED:
            ahead = inputs + start * 2 * BYTES
            low = tl.load(ahead, mask=here, other=0.0)
            high = tl.load(ahead + BYTES, mask=here, other=0.0)
            part = tl.dot(_value(tile, 0, zero[:, :, None], KIND, EXPONENT).to(dtype), low)
            part = tl.dot(_value(tile, 1, zero[:, :, None], KIND, EXPONENT).to(dtype), high, part)
        else:
            value = tl.load(inputs + start * BYTES, mask=here, other=0.0)
            part = tl.dot(_value(tile, 0, zero[:, :, None], KIND, EXPONENT).to(dtype), value)
        sums += part * scale[:, :, None]
    y = tl.sum(sums, 0)
    if BIAS:
        y += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)[:, None]
    place_out = out + t.to(tl.int64)[None, :] * out_stride + n[:, None]
    tl.store(place_out, y.to(out.dtype.element_ty), mask=used[:, None] & asked[None, :])


@jit
def _expand_kernel(
    codes,
    scales,
    zeros,
    out,
    num_outputs,
    codes_stride,
    out_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program one block of BYTES bytes of BLOCK_N rows, as numbers."""
    HALVED: tl.constexpr = KIND == "int4" or KIND == "fp4"
    BLOCKS: tl.constexpr = DIM // BLOCK
    BYTES: tl.constexpr = BLOCK // 2 if HALVED else BLOCK
    groups: tl.constexpr = BLOCKS // PER_GROUP
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = (n < num_outputs)[:, None]
    byte = tl.arange(0, BYTES)[None, :]
    tile = tl.load(codes + n.to(tl.int64)[:, None] * codes_stride + block * BYTES + byte, mask=used, other=0)
    tile = tile.to(tl.int32)
    place = (n * groups + block // PER_GROUP)[:, None]
    scale, zero = _scale_and_zero(scales, zeros, place, used, KIND)
    target = out + n.to(tl.int64)[:, None] * out_stride + block * BLOCK + byte
    tl.store(target, (_value(tile, 0, zero, KIND, EXPONENT) * scale).to(out.dtype.element_ty), mask=used)
    if HALVED:
        number = _value(tile, 1, zero, KIND, EXPONENT) * scale
        tl.store(target + BYTES, number.to(out.dtype.element_ty), mask=used)


@jit
def _fp8_rows_kernel(
    x,
    codes,
    scales,
    x_stride,
    scale_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a row: its greatest magnitude, then its codes. A NaN stays one.

    GROUP: so many channels have a scale, in a column of `scales`; 0: the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    EACH: tl.constexpr = GROUP if GROUP else WIDTH
    channel = (tl.arange(0, WIDTH // EACH) * EACH)[:, None] + tl.arange(0, EACH)[None, :]
    inputs = x + row * x_stride + channel
    largest = tl.zeros([WIDTH // EACH], tl.float32)
    if GROUP == 0:
        for start in range(0, DIM, WIDTH):
            value = tl.load(inputs + start, mask=start + channel < DIM, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
    for start in range(0, DIM, WIDTH):
        value = tl.load(inputs + start, mask=start + channel < DIM, other=0.0).to(tl.float32)
        if GROUP > 0:
            largest = tl.max(tl.abs(value), 1)
        scale = tl.maximum(largest / 448.0, 1.1754943508222875e-38)
        group = start // EACH + tl.arange(0, WIDTH // EACH)
        if GROUP == 0:
            group *= 0
        tl.store(scales + group.to(tl.int64) * scale_stride + row, scale, mask=group * EACH < DIM)
        code = (value / scale[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(codes + row * DIM + start + channel, code, mask=start + channel < DIM)


def block_of(group: int) -> int:
    """Channels of a block where a scale holds for so many: the largest power of two in them, up to 128."""
    return min(128, group & -group)


def in_bytes(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes uint8 [N, K] as the kernels take them -> [N, K * bits / 8]; `group` channels share a scale."""
    if bits == 8:
        return codes
    low, high = codes.unflatten(1, (-1, 2, block_of(group) // 2)).unbind(2)
    found: Tensor = (low | (high << 4)).flatten(1)
    return found


def codes_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *, kind: str
) -> Tensor:
    """x [T, K] times a weight [N, K] of codes -> [T, N], for 1 <= T <= MAX_ROWS; sums in float32, rounded once.

    Args:
        x: bfloat16 or float16, rows contiguous.
        codes: uint8 [N, K * bits / 8], see `in_bytes`.
        scales: floats [N, G]; K / G channels share one, of which `block_of` is LEAST_BLOCK at least.
        zeros: whole numbers float16 [N, G]; None for `fp4` and `fp8`.
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
    options = {**_blocks(dim, scales, kind), "BIAS": bias is not None}
    tensors = (x, codes, scales, scales if zeros is None else zeros, x if bias is None else bias, out)
    strides = (x.stride(0), codes.stride(0), out.stride(0))
    rows = max(16, next_power_of_2(tokens))
    block_n = max(16, _outputs_of_program(outputs, 32 if rows <= 32 else 16, x.device))
    slices = min(4, next_power_of_2(options["DIM"] // options["BLOCK"]))
    options |= {
        "ROWS": rows,
        "BLOCK_N": block_n,
        "SLICES": slices,
        "num_warps": 4,
        "num_stages": 3 if rows <= 32 else 2,
    }
    _few_rows_kernel[(cdiv(outputs, block_n),)](*tensors, tokens, outputs, *strides, **options)
    return out


def bits_of(kind: str) -> int:
    """Bits of a code."""
    return 4 if kind in HALVES else 8


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
    words = max(2, min(ROW_WORDS[bits_of(kind)], next_power_of_2(x.shape[1] * bits_of(kind) // 32)))
    pdl = experts is None and launches_dependents(x.device)
    _one_row_kernel[cdiv(outputs, block_n), rows](
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
        WORDS=words,
        PDL=pdl,
        num_warps=max(1, words // 128),
        **({"launch_pdl": True} if pdl else {}),
    )


def _blocks(dim: int, scales: Tensor, kind: str) -> dict[str, Any]:
    """How kernels go along the channels."""
    block = block_of(dim // scales.shape[1])
    return {
        "DIM": dim,
        "BLOCK": block,
        "PER_GROUP": dim // block // scales.shape[1],
        "KIND": kind,
        "EXPONENT": EXPONENTS[kind],
    }


def _outputs_of_program(outputs: int, most: int, device: torch.device) -> int:
    """A power of two up to `most` that leaves two programs for each multiprocessor, where there is that much."""
    wanted = max(1, outputs // (2 * multiprocessors(device)))
    return min(most, 1 << (wanted.bit_length() - 1))


def expand(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that codes stand for, rounded to a dtype; arguments as `codes_linear`."""
    require_triton()
    outputs, dim = codes.shape[0], codes.shape[1] * 8 // bits_of(kind)
    out = torch.empty((outputs, dim), dtype=dtype, device=codes.device)
    if outputs == 0:
        return out
    blocks = _blocks(dim, scales, kind)
    _expand_kernel[cdiv(outputs, 32), dim // blocks["BLOCK"]](
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


def fp8_rows(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [T, K] of floats as float8 e4m3 [T, K] with scales float32 [T, 1], as `core.quantized.to_fp8` makes them.

    `group`, a power of two that divides K: so many channels share a scale; scales are then [T, K / group], columns
    contiguous.
    """
    require_triton()
    tokens, dim = x.shape
    codes = torch.empty((tokens, dim), dtype=torch.uint8, device=x.device)
    scales = torch.empty((dim // group if group else 1, tokens), dtype=torch.float32, device=x.device)
    if tokens:
        assert x.stride(1) == 1
        width = min(4096, next_power_of_2(dim))
        sizes = {"DIM": dim, "WIDTH": width, "GROUP": group or 0, "num_warps": 8}
        _fp8_rows_kernel[(tokens,)](x, codes, scales, x.stride(0), scales.stride(0), **sizes)
    return codes.view(torch.float8_e4m3fn), scales.t()
