"""Places of tokens in a distribution, and the likeliest tokens of n rows of logits, as Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, require_triton, tl
from megalite.kernels.sampling import CHUNK
from megalite.kernels.weights import _load

MAX_BEST = 32
"""Likeliest tokens that `best` can find."""


@jit
def _rank_kernel(raw, raw_stride, ids, ranks, vocab, CHUNK: tl.constexpr):
    """One program a chunk of a row: adds the number of its tokens that are before the row's own."""
    n = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    own = tl.maximum(tl.load(ids + n), 0)
    x = _load(raw, n, raw_stride, places, vocab)
    mine = _load(raw, n, raw_stride, own, vocab)
    before = (x > mine) | ((x == mine) & (places < own))
    tl.atomic_add(ranks + n, tl.sum(before.to(tl.int64), 0))


@jit
def _best_kernel(raw, raw_stride, found, vocab, num_best, CHUNK: tl.constexpr):
    """One program a chunk of a row: `found` int64 [n, chunks, num_best], best first: the logit's bits, made to order
    like it, and below them the id, of equals the lowest largest."""
    n = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    bits = (_load(raw, n, raw_stride, places, vocab) + 0.0).to(tl.int32, bitcast=True)
    none = tl.full([CHUNK], -2147483648, tl.int32)
    keys = tl.where(places < vocab, bits ^ ((bits >> 31) & 0x7FFFFFFF), none)
    out = found + (n * tl.num_programs(0) + tl.program_id(0)) * num_best
    for k in range(num_best):
        key = tl.max(keys, 0)
        place = tl.min(tl.where(keys == key, places, 2147483647), 0)
        tl.store(out + k, (key.to(tl.int64) << 32) | tl.maximum(vocab - 1 - place, 0).to(tl.int64))
        keys = tl.where(places == place, none, keys)


def rank(raw: Tensor, ids: Tensor) -> Tensor:
    """Places, int64 [n] from 1, of `ids` (int64 [n]) among the logits `raw` [n, V]; of equals the lowest is first."""
    n, vocab = raw.shape
    ranks = torch.ones_like(ids)
    if n:
        require_triton()
        _rank_kernel[(cdiv(vocab, CHUNK), n)](raw, raw.stride(0), ids, ranks, vocab, CHUNK=CHUNK, num_warps=8)
    return ranks


def best(raw: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids, int64 [n, k], and logits, float32 [n, k], of the largest of `raw` [n, V], best first, of equals the lowest
    id; k in 1..min(V, MAX_BEST)."""
    n, vocab = raw.shape
    splits = -(-vocab // CHUNK)
    found = torch.empty((n, splits, k), dtype=torch.int64, device=raw.device)
    if n:
        require_triton()
        _best_kernel[(splits, n)](raw, raw.stride(0), found, vocab, k, CHUNK=CHUNK, num_warps=8)
    keys = found.view(n, -1).topk(k).values
    high = (keys >> 32).int()
    return vocab - 1 - (keys & 0xFFFFFFFF), (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
