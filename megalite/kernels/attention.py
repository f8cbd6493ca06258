"""Paged attention for generation on CUDA, as Triton kernels.

The cache of a layer is two tensors [kv_heads, slots, head_dim] with slot = block * block_size + offset; a row is one
sequence of the step, its queries are its newest tokens. A launch depends on shapes and on plain Python numbers, never
on a tensor's values, so a decode step can be captured in a CUDA graph. The current CUDA device must be the one that
holds the tensors.

The paged kernel is FlashAttention-2 (arXiv 2307.08691, algorithm 1) over block tables (PagedAttention, arXiv
2309.06180), with the query heads that share a KV head stacked in one tile. A decode step of few rows is cut along the
keys too (Flash-Decoding) and the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.kernels.jit import jit, require_triton, tl, triton

PROGRAMS = 512
"""Programs a decode step is cut into when its rows alone are fewer: a few for each multiprocessor of a large GPU."""
MAX_SPLITS = 32
"""Parts that the keys of one row are cut into at most."""


@jit
def _row_of_tile(query_start, num_rows, tile, TILE_QUERIES: tl.constexpr):
    """The row that query tile `tile` belongs to: tiles of row b start at number query_start[b] // TILE_QUERIES + b."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TILE_QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@jit
def _attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partial,
    partial_lse,
    query_start,
    context_len,
    block_table,
    table_rows,
    num_rows,
    table_stride,
    score_factor,
    cap_factor,
    q_token_stride,
    q_head_stride,
    cache_head_stride,
    cache_slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """One program: a tile of a row's queries, all query heads of one KV head, one part of the keys.

    Scores are kept as exponents of two: `score_factor` holds log2(e) (`cap_factor` does when CAPPED).
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    TILE_QUERIES: tl.constexpr = 1 if ONE_QUERY else TILE_ROWS // GROUP
    if ONE_QUERY:
        row = tile
        first = 0
    else:
        row = _row_of_tile(query_start, num_rows, tile, TILE_QUERIES)
        first = (tile - tl.load(query_start + row) // TILE_QUERIES - row) * TILE_QUERIES
    row_start = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - row_start
    if first >= num_queries:
        return
    start_position = tl.load(context_len + row) - num_queries  # of the row's first query; negative in a padding row
    table_row = row
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_rows + row)
    blocks = block_table + table_row.to(tl.int64) * table_stride

    # Line m of the tile is query first + m // GROUP under query head m % GROUP of this KV head.
    line = tl.arange(0, TILE_ROWS)
    query = first + line // GROUP
    used = (line < TILE_QUERIES * GROUP) & (query < num_queries)
    position = start_position + query
    head = kv_head * GROUP + line % GROUP
    token = (row_start + query).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    q_offset = token[:, None] * q_token_stride + head[:, None] * q_head_stride + dim[None, :]
    q_tile = tl.load(q + q_offset, mask=used[:, None] & (dim[None, :] < DIM), other=0.0)

    # Tiles of keys start at multiples of TILE_KEYS, so a query's sums do not depend on where its chunk begins.
    last = tl.minimum(first + TILE_QUERIES, num_queries)
    end = start_position + last
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(start_position + first - WINDOW + 1, 0)
    low = begin // TILE_KEYS * TILE_KEYS
    high = end
    if SPLITS > 1:
        tiles = tl.cdiv(tl.maximum(end - low, 0), TILE_KEYS)
        width = tl.cdiv(tiles, SPLITS) * TILE_KEYS
        low += split * width
        high = tl.minimum(low + width, end)

    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, BLOCK_DIM], tl.float32)
    for start in range(low, high, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        present = (key >= begin) & (key < end)
        block = tl.load(blocks + key // PAGE, mask=present, other=0)
        slot = block.to(tl.int64) * PAGE + key % PAGE
        offset = kv_head.to(tl.int64) * cache_head_stride + slot[:, None] * cache_slot_stride + dim[None, :]
        mask = present[:, None] & (dim[None, :] < DIM)
        k_tile = tl.load(k_cache + offset, mask=mask, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * score_factor
        if CAPPED:
            scores = (2 / (1 + tl.exp(-2 * scores)) - 1) * cap_factor  # tanh
        seen = present[None, :] & (key[None, :] <= position[:, None])
        if WINDOW is not None:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing seen yet: all weights are 0
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 1)
        v_tile = tl.load(v_cache + offset, mask=mask, other=0.0)
        mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * decay[:, None], input_precision="ieee")
        highest = new_highest

    divisor = tl.where(total == 0, 1.0, total)  # 0: no key seen
    mixed = mixed / divisor[:, None]
    result = token * HEADS + head
    mask = used[:, None] & (dim[None, :] < DIM)
    if SPLITS == 1:
        tl.store(out + result[:, None] * DIM + dim[None, :], mixed, mask=mask)
    else:
        part = result * SPLITS + split
        lse = tl.where(total == 0, float("-inf"), highest + tl.log2(divisor))
        tl.store(partial + part[:, None] * DIM + dim[None, :], mixed, mask=mask)
        tl.store(partial_lse + part, lse, mask=used)


@jit
def _merge_kernel(partial, partial_lse, out, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One program a query head of a token: the parts, each weighed by its share of the softmax sum."""
    result = tl.program_id(0).to(tl.int64)
    part = result * SPLITS + tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_DIM)
    lse = tl.load(partial_lse + part)
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    mask = (lse[:, None] > float("-inf")) & (dim[None, :] < DIM)
    parts = tl.load(partial + part[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + result * DIM + dim, mixed, mask=dim < DIM)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    table_rows: Tensor | None = None,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_query_len: int,
    num_splits: int | None = None,
) -> Tensor:
    """Causal attention of each row's newest tokens over its cached keys: [T, H, D] -> [T, H, D], sums in float32.

    q [T, H, D] and the caches [K, slots, D] share one dtype and have a contiguous last dim; H is a multiple of K, and
    query head h attends to KV head h // (H / K). Row b has the tokens query_start[b]..query_start[b + 1] of q
    (int32 [B + 1], from 0 to T), which are the last of its context_len[b] positions (int32 [B]); their keys are in the
    cache already. Its blocks are those of row table_rows[b] (int32 [B]; None: row b) of block_table int32 [*, blocks];
    entries outside what the row's queries see are not read. A row with context_len 0 gives zeros: the padding of a
    captured batch.

    `max_query_len` is the most queries of a row. When it is 1, `num_splits` (a power of two; null: chosen from B and K)
    says into how many parts the keys of each row are cut; a row's result depends on that number and on the row only.
    """
    tokens, heads, dim = q.shape
    rows, kv_heads = context_len.shape[0], k_cache.shape[0]
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens == 0 or heads == 0:
        return out
    assert heads % kv_heads == 0 and q.dtype == k_cache.dtype == v_cache.dtype, (q.shape, q.dtype, k_cache.dtype)
    assert k_cache.stride() == v_cache.stride() and q.stride(-1) == k_cache.stride(-1) == block_table.stride(-1) == 1
    require_triton()
    group = heads // kv_heads
    one_query = max_query_len == 1
    tile_rows, tile_keys, options = _tiles(group, dim, q.dtype, one_query)
    tiles = rows if one_query else tokens // (tile_rows // group) + rows  # at least as many as the rows need
    splits = (num_splits or _num_splits(rows, kv_heads)) if one_query else 1
    partial, lse = out, out  # not used
    if splits > 1:
        partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device)
    # Scores are exponents of two, see the kernel.
    score_factor, cap_factor = scale * math.log2(math.e), 1.0
    if softcap is not None:
        score_factor, cap_factor = scale / softcap, softcap * math.log2(math.e)
    block_dim = max(16, triton.next_power_of_2(dim))
    rows_of_table = context_len if table_rows is None else table_rows  # None: not read
    tensors = (q, k_cache, v_cache, out, partial, lse, query_start, context_len, block_table, rows_of_table)
    strides = (*q.stride()[:2], *k_cache.stride()[:2])
    _attention_kernel[(tiles, kv_heads, splits)](
        *tensors,
        rows,
        block_table.stride(0),
        score_factor,
        cap_factor,
        *strides,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_DIM=block_dim,
        PAGE=block_size,
        WINDOW=window,
        CAPPED=softcap is not None,
        ONE_QUERY=one_query,
        HAS_TABLE_ROWS=table_rows is not None,
        SPLITS=splits,
        TILE_ROWS=tile_rows,
        TILE_KEYS=tile_keys,
        **options,
    )
    if splits > 1:
        _merge_kernel[(tokens * heads,)](partial, lse, out, DIM=dim, BLOCK_DIM=block_dim, SPLITS=splits)
    return out


def _tiles(group: int, dim: int, dtype: torch.dtype, one_query: bool) -> tuple[int, int, dict[str, int]]:
    """Lines and keys of a tile, and how it is compiled. float32 has no tensor cores here, so its tiles are small."""
    fewest = max(16, triton.next_power_of_2(group))  # 16: the least a matrix product takes
    if dtype == torch.float32:
        return fewest, 32 if dim <= 128 else 16, {"num_warps": 4, "num_stages": 1}
    keys = 64 if dim <= 128 else 32
    return fewest if one_query else max(64, fewest), keys, {"num_warps": 4, "num_stages": 3}


def _num_splits(rows: int, kv_heads: int) -> int:
    """Parts to cut the keys of each row into: a power of two that grows as rows and KV heads get fewer."""
    wanted = min(MAX_SPLITS, max(1, PROGRAMS // (rows * kv_heads)))
    return 1 << (wanted.bit_length() - 1)
