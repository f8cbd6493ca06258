"""The write of new keys and values into the paged KV cache, as a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import jit, next_power_of_2, require_triton, tl


@jit
def as_kept(x, inverse, MODEL: tl.constexpr, KEPT: tl.constexpr):
    """Keys or values of a model's dtype as a cache keeps them: as they are or, in the bytes of float8 e4m3, times the
    inverse of their scale."""
    if KEPT == tl.uint8:
        scaled = x.to(MODEL).to(tl.float32) * inverse
        kept = tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        kept = x.to(KEPT)
    return kept


@jit
def _store_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cache_head_stride,
    cache_slot_stride,
    key_inverse,
    value_inverse,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program a token: its key and value go from [T, K, D] to its cache slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (head < HEADS) & (dim < DIM)
    target = head.to(tl.int64) * cache_head_stride + slot * cache_slot_stride + dim
    key = tl.load(k + token * k_token_stride + head * k_head_stride + dim, mask=mask)
    value = tl.load(v + token * v_token_stride + head * v_head_stride + dim, mask=mask)
    KEPT: tl.constexpr = k_cache.dtype.element_ty
    tl.store(k_cache + target, as_kept(key, key_inverse, k.dtype.element_ty, KEPT), mask=mask)
    tl.store(v_cache + target, as_kept(value, value_inverse, v.dtype.element_ty, KEPT), mask=mask)


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write keys and values [T, K, D] into the caches [K, slots, D] at `slots` (int64 [T]); slot -1 is not written.

    The last dim of every tensor is contiguous and both caches have the same strides. Slots other than -1 are distinct.
    Caches in float8 e4m3 get keys and values divided by `scales`.
    """
    tokens, heads, dim = k.shape
    assert k_cache.stride() == v_cache.stride() and k.stride(-1) == v.stride(-1) == k_cache.stride(-1) == 1
    if tokens == 0 or heads == 0:
        return
    require_triton()
    k_cache, v_cache = as_bytes(k_cache), as_bytes(v_cache)
    strides = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2])
    blocks = {"BLOCK_HEADS": next_power_of_2(heads), "BLOCK_DIM": next_power_of_2(dim)}
    inverses = (1 / scales[0], 1 / scales[1])
    _store_kernel[(tokens,)](k, v, k_cache, v_cache, slots, *strides, *inverses, HEADS=heads, DIM=dim, **blocks)


def as_bytes(cache: Tensor) -> Tensor:
    """A cache in fp8 by its bits, as kernels take it; others as they are."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
