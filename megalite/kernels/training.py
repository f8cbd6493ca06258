"""Norms and heads in training on CUDA: forward passes that overwrite nothing and their gradients, in Triton.

A gradient is one pass over memory: what else goes into its tensor (the gradient of the residual stream past a norm,
that of the values beside queries and keys) is written by the same kernel. Arithmetic is in float32, what is stored is
rounded once. The gradient of a weight is summed by each program over the rows it works on, then over programs, always
in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, multiprocessors, next_power_of_2, require_triton, tl

PROGRAMS = 8
"""Programs for each multiprocessor where every one of them sums the gradient of a weight."""
HEADS = 16
"""Heads, of a token or of several, whose gradient a program computes at a time."""

ACCUMULATED = 2048
"""Numbers of a gradient that a program adds up."""


@jit
def _add_norm_kernel(
    x,
    update,
    weight,
    stream,
    out,
    x_stride,
    update_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(update + row * update_stride + column, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(stream.dtype.element_ty)
        tl.store(stream + row * DIM + column, stored, mask=inside)
        value = stored.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        scale += 1.0
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / DIM + eps) * scale
    tl.store(out + row * DIM + column, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, *, zero_centred: bool = False
) -> tuple[Tensor, Tensor]:
    """x + update, or x itself without one, and its RMSNorm (arXiv 1910.07467): [T, D] both.

    The norm is times `weight` [D], or (1 + weight) when `zero_centred`. The last dim of x and update is contiguous.
    """
    require_triton()
    tokens, dim = x.shape
    assert x.stride(1) == 1 and (update is None or update.stride(1) == 1)
    stream = x if update is None else torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    if tokens:
        block = next_power_of_2(dim)
        _add_norm_kernel[(tokens,)](
            x,
            x if update is None else update,
            weight,
            stream,
            out,
            x.stride(0),
            0 if update is None else update.stride(0),
            eps,
            DIM=dim,
            BLOCK=block,
            ADD=update is not None,
            ZERO_CENTRED=zero_centred,
            num_warps=_warps(block),
        )
    return stream, out


@jit
def _norm_gradient_kernel(
    stream,
    weight,
    grad,
    past,
    into,
    sums,
    num_rows,
    stream_stride,
    grad_stride,
    past_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAST: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
):
    """A program every so many rows."""
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        scale += 1.0
    into_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        x = tl.load(stream + row * stream_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
        unit = x * inverse
        into_weight += g * unit
        g = g * scale
        gradient = (g - unit * (tl.sum(g * unit, 0) / DIM)) * inverse
        if PAST:
            gradient += tl.load(past + row * past_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(into + row * DIM + column, gradient.to(into.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * DIM + column, into_weight, mask=inside)


def norm_gradient(
    stream: Tensor, weight: Tensor, grad: Tensor, past: Tensor | None, eps: float, *, zero_centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of `stream` [T, D] and `weight` [D] from that of the norm, `grad`, and that of the stream past it.

    With unit = x / rms(x), dx = (w g - unit mean(w g unit)) / rms(x) + past, and dw = sum over rows of g unit.
    """
    require_triton()
    tokens, dim = stream.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    past = past if past is None or past.stride(1) == 1 else past.contiguous()
    into = torch.empty((tokens, dim), dtype=stream.dtype, device=stream.device)
    programs = min(tokens, PROGRAMS * multiprocessors(stream.device))
    sums = torch.empty((programs, dim), dtype=torch.float32, device=stream.device)
    if tokens:
        block = next_power_of_2(dim)
        _norm_gradient_kernel[(programs,)](
            stream,
            weight,
            grad,
            grad if past is None else past,
            into,
            sums,
            tokens,
            stream.stride(0),
            grad.stride(0),
            0 if past is None else past.stride(0),
            eps,
            DIM=dim,
            BLOCK=block,
            PAST=past is not None,
            ZERO_CENTRED=zero_centred,
            num_warps=_warps(block),
        )
    return into, sums.sum(0).to(weight.dtype)


@jit
def _turn(table, positions, token, half_of, rotated, HALF: tl.constexpr, BY_POSITION: tl.constexpr):
    """Cosines and sines of a token's channels; channels that are not `rotated` keep what they are."""
    at = token
    if BY_POSITION:
        at = tl.load(positions + token).to(tl.int64)
    cos = tl.load(table + at * (2 * HALF) + half_of, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(table + at * (2 * HALF) + HALF + half_of, mask=rotated, other=0.0).to(tl.float32)
    return cos, sin


@jit
def _heads_kernel(
    qkv,
    q_weight,
    k_weight,
    table,
    positions,
    out,
    token_stride,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """One program the queries or the keys of a token. Channels c and c + HALF of a head are partners for c < HALF."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    is_first = column < HALF
    rotated = column < 2 * HALF
    partner = tl.where(is_first, column + HALF, tl.where(rotated, column - HALF, column))
    number = tl.arange(0, BLOCK_HEADS)
    head = number
    present = number < QUERIES
    weight = q_weight
    if tl.program_id(1) == 1:
        head = QUERIES + number
        present = number < KEYS
        weight = k_weight
    mask = present[:, None] & inside[None, :]
    source = qkv + token * token_stride + head[:, None] * DIM
    x = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        other_scale = tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            scale += 1.0
            other_scale += 1.0
        inverse = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x = x * inverse * scale[None, :]
        other = other * inverse * other_scale[None, :]
    cos, sin = _turn(table, positions, token, tl.where(is_first, column, partner), rotated, HALF, BY_POSITION)
    sin = tl.where(is_first, -sin, sin)
    turned = x * cos[None, :] + other * sin[None, :]
    to = out + token * ((QUERIES + KEYS) * DIM) + head[:, None] * DIM + column[None, :]
    tl.store(to, turned.to(out.dtype.element_ty), mask=mask)


Norms = tuple[Tensor, Tensor, float]
"""RMSNorm weights [D] of query heads and of key heads, and eps."""


def turn_heads(
    qkv: Tensor,
    counts: tuple[int, int],
    table: Tensor,
    positions: Tensor | None,
    norms: Norms | None,
    *,
    zero_centred: bool = False,
) -> Tensor:
    """Queries and keys of qkv [T, H + 2 K, D] after their norms and rotation: [T, H + K, D]. `counts`: (H, K).

    `table` float32 [P, R]: cosines, then sines of R / 2 angles, by which channels c and c + R / 2 of a head are turned;
    its row is `positions` (int64 [T]), or the token's number without. A token's heads are contiguous.
    """
    require_triton()
    tokens, heads, dim = qkv.shape
    queries, keys = counts
    assert qkv.stride()[1:] == (dim, 1) and heads == queries + 2 * keys and table.is_contiguous()
    out = torch.empty((tokens, queries + keys, dim), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
        block, block_heads = _tile(queries, keys, dim)
        _heads_kernel[(tokens, 2)](
            qkv,
            q_weight,
            k_weight,
            table,
            table if positions is None else positions,
            out,
            qkv.stride(0),
            eps,
            QUERIES=queries,
            KEYS=keys,
            DIM=dim,
            HALF=table.shape[1] // 2,
            BLOCK_HEADS=block_heads,
            BLOCK=block,
            NORM=norms is not None,
            ZERO_CENTRED=zero_centred,
            BY_POSITION=positions is not None,
            num_warps=_warps(block * block_heads),
        )
    return out


@jit
def _heads_gradient_kernel(
    qkv,
    q_weight,
    k_weight,
    table,
    positions,
    into_q,
    into_k,
    into_v,
    into,
    sums,
    num_rows,
    token_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """A program every so many blocks of heads among the queries, keys or values (kind 0, 1, 2) of all tokens.

    A block is three tiles: the channels that are turned with each other, and those that stay, if any. Sums over a head
    stay within a warp, and nothing is added over heads before the end.
    """
    kind = tl.program_id(1)
    gradient_of = into_q
    gradient_token_stride = q_token_stride
    gradient_head_stride = q_head_stride
    weight = q_weight
    heads = QUERIES
    first_head = 0
    if kind == 1:
        gradient_of = into_k
        gradient_token_stride = k_token_stride
        gradient_head_stride = k_head_stride
        weight = k_weight
        heads = KEYS
        first_head = QUERIES
    if kind == 2:
        gradient_of = into_v
        gradient_token_stride = v_token_stride
        gradient_head_stride = v_head_stride
        heads = KEYS
        first_head = QUERIES + KEYS
    half = tl.arange(0, BLOCK_HALF)
    rest = tl.arange(0, BLOCK_REST)
    in_half = half < HALF
    in_rest = rest < DIM - 2 * HALF
    if NORM:
        scale_1 = tl.load(weight + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        scale_2 = tl.load(weight + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        scale_3 = tl.load(weight + 2 * HALF + rest, mask=in_rest, other=0.0).to(tl.float32)[None, :]
        if ZERO_CENTRED:
            scale_1 += 1.0
            scale_2 += 1.0
            scale_3 += 1.0
    sum_1 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    sum_2 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    sum_3 = tl.zeros((BLOCK_HEADS, BLOCK_REST), dtype=tl.float32)
    start = tl.program_id(0) * BLOCK_HEADS
    while start < num_rows * heads:
        row = start + tl.arange(0, BLOCK_HEADS)
        present = row < num_rows * heads
        token = (row // heads).to(tl.int64)
        head = row % heads
        mask = present[:, None] & in_half[None, :]
        mask_3 = present[:, None] & in_rest[None, :]
        source = gradient_of + (token * gradient_token_stride + head * gradient_head_stride)[:, None]
        g_1 = tl.load(source + half[None, :], mask=mask, other=0.0).to(tl.float32)
        g_2 = tl.load(source + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
        g_3 = tl.load(source + 2 * HALF + rest[None, :], mask=mask_3, other=0.0).to(tl.float32)
        if kind < 2:
            at = token
            if BY_POSITION:
                at = tl.load(positions + token, mask=present, other=0).to(tl.int64)
            angles = table + (at * (2 * HALF))[:, None] + half[None, :]
            cos = tl.load(angles, mask=mask, other=1.0).to(tl.float32)
            sin = tl.load(angles + HALF, mask=mask, other=0.0).to(tl.float32)
            back_1 = g_1 * cos + g_2 * sin
            g_2 = g_2 * cos - g_1 * sin
            g_1 = back_1
            if NORM:
                place = qkv + (token * token_stride + (first_head + head) * DIM)[:, None]
                x_1 = tl.load(place + half[None, :], mask=mask, other=0.0).to(tl.float32)
                x_2 = tl.load(place + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
                x_3 = tl.load(place + 2 * HALF + rest[None, :], mask=mask_3, other=0.0).to(tl.float32)
                square = tl.sum(x_1 * x_1 + x_2 * x_2, 1) + tl.sum(x_3 * x_3, 1)
                inverse = tl.rsqrt(square / DIM + eps)[:, None]
                x_1 = x_1 * inverse
                x_2 = x_2 * inverse
                x_3 = x_3 * inverse
                sum_1 += g_1 * x_1
                sum_2 += g_2 * x_2
                sum_3 += g_3 * x_3
                g_1 = g_1 * scale_1
                g_2 = g_2 * scale_2
                g_3 = g_3 * scale_3
                along = ((tl.sum(g_1 * x_1 + g_2 * x_2, 1) + tl.sum(g_3 * x_3, 1)) / DIM)[:, None]
                g_1 = (g_1 - x_1 * along) * inverse
                g_2 = (g_2 - x_2 * along) * inverse
                g_3 = (g_3 - x_3 * along) * inverse
        to = into + (token * ((QUERIES + 2 * KEYS) * DIM) + (first_head + head) * DIM)[:, None]
        tl.store(to + half[None, :], g_1.to(into.dtype.element_ty), mask=mask)
        tl.store(to + HALF + half[None, :], g_2.to(into.dtype.element_ty), mask=mask)
        tl.store(to + 2 * HALF + rest[None, :], g_3.to(into.dtype.element_ty), mask=mask_3)
        start += tl.num_programs(0) * BLOCK_HEADS
    if NORM:
        if kind < 2:
            target = sums + (tl.program_id(0) * 2 + kind).to(tl.int64) * DIM
            tl.store(target + half, tl.sum(sum_1, 0), mask=in_half)
            tl.store(target + HALF + half, tl.sum(sum_2, 0), mask=in_half)
            tl.store(target + 2 * HALF + rest, tl.sum(sum_3, 0), mask=in_rest)


def heads_gradient(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor | None,
    norms: Norms | None,
    into_q: Tensor,
    into_k: Tensor,
    into_v: Tensor,
    *,
    zero_centred: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv [T, H + 2 K, D] and of the norms' weights [D] from those of `turn_heads` and of the values.

    `into_q` [T, H, D], `into_k` and `into_v` [T, K, D], whose last dim is contiguous.
    """
    require_triton()
    tokens, heads, dim = qkv.shape
    queries, keys = into_q.shape[1], into_k.shape[1]
    into_q, into_k, into_v = (one if one.stride(2) == 1 else one.contiguous() for one in (into_q, into_k, into_v))
    into = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    programs = min(cdiv(tokens * max(queries, keys), HEADS), PROGRAMS * multiprocessors(qkv.device))
    sums = torch.empty((programs, 2, dim), dtype=torch.float32, device=qkv.device)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    if into.numel():
        half = table.shape[1] // 2
        block_half, block_rest = (next_power_of_2(max(1, channels)) for channels in (half, dim - 2 * half))
        _heads_gradient_kernel[(programs, 3)](
            qkv,
            q_weight,
            k_weight,
            table,
            table if positions is None else positions,
            into_q,
            into_k,
            into_v,
            into,
            sums,
            tokens,
            qkv.stride(0),
            *into_q.stride()[:2],
            *into_k.stride()[:2],
            *into_v.stride()[:2],
            eps,
            QUERIES=queries,
            KEYS=keys,
            DIM=dim,
            HALF=half,
            BLOCK_HEADS=HEADS,
            BLOCK_HALF=block_half,
            BLOCK_REST=block_rest,
            NORM=norms is not None,
            ZERO_CENTRED=zero_centred,
            BY_POSITION=positions is not None,
            num_warps=_warps(HEADS * (2 * block_half + block_rest) // 2),
        )
    if norms is None:
        return into, None, None
    into_weights = sums.sum(0)
    return into, into_weights[0].to(q_weight.dtype), into_weights[1].to(k_weight.dtype)


@jit
def _accumulate_kernel(total, gradient, length, ADD: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    value = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(total + place, mask=inside, other=0.0)
    tl.store(total + place, value, mask=inside)


def accumulate_(total: Tensor, gradient: Tensor, *, first: bool) -> Tensor:
    """Add `gradient` to `total`, float32 of the same shape, or put it there if it is the `first`; gives `total`.

    Both are contiguous. PyTorch's own kernel reads one number at a time where dtypes differ.
    """
    require_triton()
    assert total.is_contiguous() and gradient.is_contiguous() and total.dtype == torch.float32
    if total.numel():
        grid = (cdiv(total.numel(), ACCUMULATED),)
        _accumulate_kernel[grid](total, gradient, total.numel(), ADD=not first, BLOCK=ACCUMULATED, num_warps=4)
    return total


def _tile(queries: int, keys: int, dim: int) -> tuple[int, int]:
    """Channels and heads of a program's tile: all heads of one kind."""
    return next_power_of_2(dim), next_power_of_2(max(queries, keys))


def _warps(numbers: int) -> int:
    """Warps of a program that works on so many numbers at a time."""
    return 1 << (min(8, max(1, numbers // 256)).bit_length() - 1)
