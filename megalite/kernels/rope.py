"""Rotation of heads (arXiv 2104.09864) on CUDA, as Triton kernels: alone, and with all else that lies between the
product of q, k and v and attention over a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, next_power_of_2, require_triton, tl
from megalite.kernels.store import as_bytes, as_kept

TILE = 1024
"""Numbers of a program, about."""
WARPS = 2
"""Of a program: a thread then reads and writes 16 bytes at a time."""


@jit
def _rope_kernel(
    qkv,
    k_cache,
    v_cache,
    slots,
    positions,
    table,
    q_weight,
    k_weight,
    eps,
    token_stride,
    cache_head_stride,
    cache_slot_stride,
    table_rows,
    key_inverse,
    value_inverse,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    BY_POSITION: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program some heads of a token, all of them queries, keys or values (kind 0, 1, 2)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    Q_TILES: tl.constexpr = (QUERIES + BLOCK_HEADS - 1) // BLOCK_HEADS
    K_TILES: tl.constexpr = (KEYS + BLOCK_HEADS - 1) // BLOCK_HEADS
    REST: tl.constexpr = DIM - 2 * HALF
    kind = (tile >= Q_TILES).to(tl.int32) + (tile >= Q_TILES + K_TILES).to(tl.int32)
    passed = tl.where(kind == 0, 0, tl.where(kind == 1, Q_TILES, Q_TILES + K_TILES))  # tiles of the kinds before
    heads_before = tl.where(kind == 0, 0, tl.where(kind == 1, QUERIES, QUERIES + KEYS))
    head = (tile - passed) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    present = head < tl.where(kind == 0, QUERIES, KEYS)

    pair = tl.arange(0, BLOCK_HALF)
    paired = pair < HALF
    mask = present[:, None] & paired[None, :]
    source = qkv + token * token_stride + (heads_before + head)[:, None] * DIM
    first = tl.load(source + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    rest_of = tl.arange(0, BLOCK_REST)  # channels that are not rotated
    rest_mask = present[:, None] & (rest_of < REST)[None, :]
    if REST > 0:
        rest = tl.load(source + 2 * HALF + rest_of[None, :], mask=rest_mask, other=0.0).to(tl.float32)

    if NORM:
        if kind < 2:
            is_query = kind == 0
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            if REST > 0:
                squares += tl.sum(rest * rest, 1)
            inverse = tl.rsqrt(squares / DIM + eps)[:, None]
            w_first = tl.load(q_weight + pair, mask=paired & is_query, other=0.0).to(tl.float32)
            w_first += tl.load(k_weight + pair, mask=paired & (kind == 1), other=0.0).to(tl.float32)
            w_second = tl.load(q_weight + HALF + pair, mask=paired & is_query, other=0.0).to(tl.float32)
            w_second += tl.load(k_weight + HALF + pair, mask=paired & (kind == 1), other=0.0).to(tl.float32)
            if ZERO_CENTRED:
                w_first += 1.0
                w_second += 1.0
            first = first * inverse * w_first[None, :]
            second = second * inverse * w_second[None, :]
            if REST > 0:
                is_rest = rest_of < REST
                w_rest = tl.load(q_weight + 2 * HALF + rest_of, mask=is_rest & is_query, other=0.0).to(tl.float32)
                w_rest += tl.load(k_weight + 2 * HALF + rest_of, mask=is_rest & (kind == 1), other=0.0).to(tl.float32)
                if ZERO_CENTRED:
                    w_rest += 1.0
                rest = rest * inverse * w_rest[None, :]
    if kind < 2:
        at = token
        if BY_POSITION:
            at = tl.minimum(tl.load(positions + token).to(tl.int64), table_rows - 1)
        cos = tl.load(table + at * (2 * HALF) + pair, mask=paired, other=0.0)[None, :]
        sin = tl.load(table + at * (2 * HALF) + HALF + pair, mask=paired, other=0.0)[None, :]
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned

    kept = kind == 0
    if KEEP_KEYS:
        kept = kind < 2
    if kept:
        tl.store(source + pair[None, :], first.to(qkv.dtype.element_ty), mask=mask)
        tl.store(source + HALF + pair[None, :], second.to(qkv.dtype.element_ty), mask=mask)
        if REST > 0:
            if NORM:
                tl.store(source + 2 * HALF + rest_of[None, :], rest.to(qkv.dtype.element_ty), mask=rest_mask)
    MODEL: tl.constexpr = qkv.dtype.element_ty
    KEPT: tl.constexpr = k_cache.dtype.element_ty
    if kind > 0:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            to = head[:, None].to(tl.int64) * cache_head_stride + slot * cache_slot_stride
            if kind == 1:
                tl.store(k_cache + to + pair[None, :], as_kept(first, key_inverse, MODEL, KEPT), mask=mask)
                tl.store(k_cache + to + HALF + pair[None, :], as_kept(second, key_inverse, MODEL, KEPT), mask=mask)
                if REST > 0:
                    to += 2 * HALF
                    tl.store(k_cache + to + rest_of[None, :], as_kept(rest, key_inverse, MODEL, KEPT), mask=rest_mask)
            else:
                tl.store(v_cache + to + pair[None, :], as_kept(first, value_inverse, MODEL, KEPT), mask=mask)
                tl.store(v_cache + to + HALF + pair[None, :], as_kept(second, value_inverse, MODEL, KEPT), mask=mask)
                if REST > 0:
                    to += 2 * HALF
                    tl.store(v_cache + to + rest_of[None, :], as_kept(rest, value_inverse, MODEL, KEPT), mask=rest_mask)


def rotate_and_store(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    table: Tensor,
    *,
    positions: Tensor | None,
    norms: tuple[Tensor, Tensor, float] | None = None,
    zero_centred: bool = False,
    keep_keys: bool = False,
    scales: tuple[float, float] = (1.0, 1.0),
    pdl: bool = False,
) -> None:
    """Norm and rotate queries of qkv [T, H + 2 K, D] in place; write its keys, so treated, and values to the caches.

    Caches [K, slots, D] of equal strides, at `slots` (int [T]; -1: not written; else distinct). Channels c and c + R/2
    of a head are rotated for c < R/2, the others pass through. `table` float32 [positions, R]: cosines, then sines of
    the R/2 angles of `positions` (int [T]); where `positions` is None it is [T, R], of each token. `norms`: RMSNorm
    weights [D] of query and key heads and eps, times (1 + weight) when `zero_centred`; they come before the rotation.
    `keep_keys`: the treated keys are written to qkv too. Computed in float32, rounded once; `scales`: as in
    `store.store_kv`, of what would be kept otherwise. `pdl`: as `norm.rms_norm`.
    """
    require_triton()
    k_cache, v_cache = as_bytes(k_cache), as_bytes(v_cache)
    tokens, heads, dim = qkv.shape
    keys, half = k_cache.shape[0], table.shape[1] // 2
    assert qkv.stride()[1:] == (dim, 1) and k_cache.stride() == v_cache.stride() and k_cache.stride(2) == 1
    assert table.is_contiguous() and 0 < 2 * half <= dim and heads >= 2 * keys
    queries, rest = heads - 2 * keys, dim - 2 * half
    if tokens == 0 or heads == 0:
        return
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    block_half, block_rest = next_power_of_2(half), next_power_of_2(max(rest, 1))
    most = next_power_of_2(max(queries, keys))
    block_heads = min(most, max(1, TILE // next_power_of_2(dim)))
    tiles = cdiv(queries, block_heads) + 2 * cdiv(keys, block_heads)
    _rope_kernel[(tokens, tiles)](
        qkv,
        k_cache,
        v_cache,
        slots,
        slots if positions is None else positions,
        table,
        q_weight,
        k_weight,
        eps,
        qkv.stride(0),
        *k_cache.stride()[:2],
        table.shape[0],
        1 / scales[0],
        1 / scales[1],
        QUERIES=queries,
        KEYS=keys,
        DIM=dim,
        HALF=half,
        BLOCK_HALF=block_half,
        BLOCK_REST=block_rest,
        BLOCK_HEADS=block_heads,
        NORM=norms is not None,
        ZERO_CENTRED=zero_centred,
        BY_POSITION=positions is not None,
        KEEP_KEYS=keep_keys,
        PDL=pdl,
        num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )


@jit
def _rotate_kernel(
    x,
    out,
    table,
    positions,
    token_stride,
    head_stride,
    table_rows,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BACK: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """One program some heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    present = (head < HEADS)[:, None]
    pair = tl.arange(0, BLOCK_HALF)
    paired = pair < HALF
    mask = present & paired[None, :]
    source = x + token * token_stride + head[:, None] * head_stride
    target = out + (token * HEADS + head[:, None]) * DIM
    at = token
    if BY_POSITION:
        at = tl.minimum(tl.load(positions + token).to(tl.int64), table_rows - 1)
    cos = tl.load(table + at * (2 * HALF) + pair, mask=paired, other=0.0)[None, :]
    sin = tl.load(table + at * (2 * HALF) + HALF + pair, mask=paired, other=0.0)[None, :]
    if BACK:
        sin = -sin
    first = tl.load(source + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(target + pair[None, :], (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF + pair[None, :], (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)
    if DIM > 2 * HALF:
        channel = 2 * HALF + tl.arange(0, BLOCK_REST)
        there = present & (channel < DIM)[None, :]
        tl.store(target + channel[None, :], tl.load(source + channel[None, :], mask=there), mask=there)


def rotate(x: Tensor, table: Tensor, positions: Tensor | None, *, back: bool = False) -> Tensor:
    """Heads [T, H, D], last dim contiguous, turned by the angles of their tokens -> [T, H, D], contiguous.

    `table`, `positions`: as in `rotate_and_store`. `back`: by the angles' negatives, which is the backward pass.
    """
    require_triton()
    tokens, heads, dim = x.shape
    half = table.shape[1] // 2
    assert x.stride(2) == 1 and table.is_contiguous() and 0 < 2 * half <= dim
    out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    if out.numel():
        block_heads = min(next_power_of_2(heads), max(1, TILE // next_power_of_2(dim)))
        _rotate_kernel[(tokens, cdiv(heads, block_heads))](
            x,
            out,
            table,
            table if positions is None else positions,
            *x.stride()[:2],
            table.shape[0],
            HEADS=heads,
            DIM=dim,
            HALF=half,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(max(dim - 2 * half, 1)),
            BLOCK_HEADS=block_heads,
            BACK=back,
            BY_POSITION=positions is not None,
            num_warps=WARPS,
        )
    return out
