"""The write of new keys and values into the paged KV cache, as a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from megalite.kernels.jit import jit, require_triton, tl, triton


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
    tl.store(k_cache + target, key, mask=mask)
    tl.store(v_cache + target, value, mask=mask)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, K, D] into the caches [K, slots, D] at `slots` (int64 [T]); slot -1 is not written.

    The last dim of every tensor is contiguous and both caches have the same strides. Slots other than -1 are distinct.
    """
    tokens, heads, dim = k.shape
    assert k_cache.stride() == v_cache.stride() and k.stride(-1) == v.stride(-1) == k_cache.stride(-1) == 1
    if tokens == 0 or heads == 0:
        return
    require_triton()
    strides = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2])
    blocks = {"BLOCK_HEADS": triton.next_power_of_2(heads), "BLOCK_DIM": triton.next_power_of_2(dim)}
    _store_kernel[(tokens,)](k, v, k_cache, v_cache, slots, *strides, HEADS=heads, DIM=dim, **blocks)
