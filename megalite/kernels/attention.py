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
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megalite.kernels.jit import jit, multiprocessors, next_power_of_2, require_triton, shared_memory, tl
from megalite.kernels.store import as_bytes

MAX_SPLITS = 32
"""Parts that the keys of one row are cut into at most."""
LARGE_SHARED_MEMORY = 200 << 10
"""Bytes that the largest tiles need; Hopper's multiprocessors have 227 KiB, other cards 99 or 163."""


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
def _load_tile(
    data,
    blocks,
    start,
    begin,
    end,
    dim,
    slot_stride,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Keys or values of TILE_KEYS positions from `start` on, in DTYPE; MASKED: zeros outside begin..end."""
    key = start + tl.arange(0, TILE_KEYS)
    present = (key >= begin) & (key < end)
    slot = key.to(tl.int64)
    if PAGE > 0:
        block = tl.load(blocks + key // PAGE, mask=present, other=0) if MASKED else tl.load(blocks + key // PAGE)
        # Triton 3.6 takes sums of two multiples of PAGE, of which one counts up from there, for multiples of PAGE, and
        # would read rows of no multiple of 16 bytes in pieces that are not aligned.
        slot = tl.multiple_of(block.to(tl.int64) * PAGE + key % PAGE, 1)
    place = data + slot[:, None] * slot_stride + dim[None, :]
    BARE: tl.constexpr = not MASKED and DIM == dim.shape[0]
    if BARE:
        tile = tl.load(place)
    elif MASKED:
        tile = tl.load(place, mask=present[:, None] & (dim[None, :] < DIM), other=0.0)
    else:
        tile = tl.load(place, mask=dim[None, :] < DIM, other=0.0)
    if data.dtype.element_ty == tl.uint8:
        tile = tile.to(tl.float8e4nv, bitcast=True)
    return tile.to(DTYPE)


@jit
def _score(
    q_tile,
    q_rest,
    data,
    blocks,
    start,
    begin,
    end,
    dim,
    rest,
    slot_stride,
    DIM: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """q k^T for the keys of a tile, of DIM channels and REST behind them."""
    k_tile = _load_tile(data, blocks, start, begin, end, dim, slot_stride, DIM, PAGE, TILE_KEYS, True, q_tile.dtype)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if REST > 0:
        k_rest = _load_tile(
            data + DIM, blocks, start, begin, end, rest, slot_stride, REST, PAGE, TILE_KEYS, True, q_tile.dtype
        )
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
    return scores


@jit
def _weigh(
    scores,
    v_tile,
    highest,
    total,
    mixed,
    start,
    end,
    position,
    score_factor,
    cap_factor,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax sums with one more tile of keys. The same bits with and without masks where every key is seen."""
    factor = score_factor
    if CAPPED:
        scores = 2 / (1 + tl.exp(-2 * score_factor * scores)) - 1  # tanh
        factor = cap_factor
    if MASKED:
        key = start + tl.arange(0, TILE_KEYS)
        seen = (key < end)[None, :] & (key[None, :] <= position[:, None])
        if WINDOW is not None:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        if CHUNK is not None:
            seen = seen & (key[None, :] >= (position // CHUNK * CHUNK)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
    shift = new_highest
    if MASKED:
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing seen yet: all weights are 0
    weights = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + factor, tl.zeros_like(scores) - shift[:, None]))
    decay = tl.exp2(highest - shift)
    total = tl.fma(total, decay, tl.sum(weights, 1))
    mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * decay[:, None], input_precision="ieee")
    return new_highest, total, mixed


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
    sinks,
    num_rows,
    table_stride,
    score_factor,
    cap_factor,
    q_token_stride,
    q_head_stride,
    k_head_stride,
    k_slot_stride,
    v_head_stride,
    v_slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: a tile of a row's queries, all query heads of one KV head, one part of the keys.

    Scores are kept as exponents of two: `score_factor` holds log2(e) (`cap_factor` does when CAPPED). PAGE is 0 where
    the keys are not in a paged cache but those of the step's own tokens. Keys may have REST channels more than values.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    TILE_QUERIES: tl.constexpr = 1 if ONE_QUERY else TILE_ROWS // GROUP
    if ONE_QUERY:
        row = tile
        first = 0
    else:
        tile = tl.num_programs(0) - 1 - tile  # the end of a row sees the most keys: it comes first
        row = _row_of_tile(query_start, num_rows, tile, TILE_QUERIES)
        first = (tile - tl.load(query_start + row) // TILE_QUERIES - row) * TILE_QUERIES
    row_start = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - row_start
    if first >= num_queries:
        return
    blocks = block_table
    k_head = k_cache + kv_head * k_head_stride
    v_head = v_cache + kv_head * v_head_stride
    start_position = 0
    if PAGE > 0:
        # Position of the row's first query; negative in a padding row.
        start_position = tl.load(context_len + row) - num_queries
        table_row = row
        if HAS_TABLE_ROWS:
            table_row = tl.load(table_rows + row)
        blocks += table_row.to(tl.int64) * table_stride
    else:
        k_head += row_start.to(tl.int64) * k_slot_stride
        v_head += row_start.to(tl.int64) * v_slot_stride

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
    rest = dim
    q_rest = q_tile
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)
        rest_offset = token[:, None] * q_token_stride + head[:, None] * q_head_stride + DIM + rest[None, :]
        q_rest = tl.load(q + rest_offset, mask=used[:, None] & (rest[None, :] < REST), other=0.0)

    # Tiles of keys start at multiples of TILE_KEYS, so a query's sums do not depend on where its chunk begins.
    end = start_position + tl.minimum(first + TILE_QUERIES, num_queries)
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(start_position + first - WINDOW + 1, 0)
    if CHUNK is not None:
        begin = tl.maximum(begin, (start_position + first) // CHUNK * CHUNK)
    low = begin // TILE_KEYS * TILE_KEYS
    high = end
    if SPLITS > 1:
        tiles = tl.cdiv(tl.maximum(end - low, 0), TILE_KEYS)
        width = tl.cdiv(tiles, SPLITS) * TILE_KEYS
        low += split * width
        high = tl.minimum(low + width, end)
    DTYPE: tl.constexpr = q.dtype.element_ty
    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, BLOCK_DIM], tl.float32)
    if HAS_SINKS:  # a key without a value, in the first part
        sink = tl.load(sinks + head, mask=used, other=0.0).to(tl.float32) * 1.4426950408889634
        highest = tl.where(split == 0, sink, float("-inf"))
        total = tl.where(split == 0, 1.0, 0.0) + tl.zeros([TILE_ROWS], tl.float32)
    masked = low
    if not ONE_QUERY:
        # Every line sees all keys of the tiles before `masked`, but for a window. The scores of the next tile are
        # multiplied while the weights of this one are computed (FlashAttention-3, arXiv 2407.08608, section 3.2).
        masked = tl.maximum(low, (start_position + first + 1) // TILE_KEYS * TILE_KEYS)
        scores = _score(
            q_tile, q_rest, k_head, blocks, low, begin, end, dim, rest, k_slot_stride, DIM, REST, PAGE, TILE_KEYS
        )
        EDGES: tl.constexpr = WINDOW is not None or CHUNK is not None
        for start in range(low, masked, TILE_KEYS):
            after = start + TILE_KEYS
            next_scores = _score(
                q_tile, q_rest, k_head, blocks, after, begin, end, dim, rest, k_slot_stride, DIM, REST, PAGE, TILE_KEYS
            )
            v_tile = _load_tile(
                v_head, blocks, start, begin, end, dim, v_slot_stride, DIM, PAGE, TILE_KEYS, EDGES, DTYPE
            )
            highest, total, mixed = _weigh(
                scores, v_tile, highest, total, mixed, start, end, position,
                score_factor, cap_factor, WINDOW, CHUNK, CAPPED, TILE_KEYS, EDGES,
            )  # fmt: skip
            scores = next_scores
        v_tile = _load_tile(v_head, blocks, masked, begin, end, dim, v_slot_stride, DIM, PAGE, TILE_KEYS, True, DTYPE)
        highest, total, mixed = _weigh(
            scores, v_tile, highest, total, mixed, masked, end, position,
            score_factor, cap_factor, WINDOW, CHUNK, CAPPED, TILE_KEYS, True,
        )  # fmt: skip
        masked += TILE_KEYS
    for start in range(masked, high, TILE_KEYS):
        scores = _score(
            q_tile, q_rest, k_head, blocks, start, begin, end, dim, rest, k_slot_stride, DIM, REST, PAGE, TILE_KEYS
        )
        v_tile = _load_tile(v_head, blocks, start, begin, end, dim, v_slot_stride, DIM, PAGE, TILE_KEYS, True, DTYPE)
        highest, total, mixed = _weigh(
            scores, v_tile, highest, total, mixed, start, end, position,
            score_factor, cap_factor, WINDOW, CHUNK, CAPPED, TILE_KEYS, True,
        )  # fmt: skip

    divisor = tl.where(total == 0, 1.0, total)  # 0: no key seen
    mixed = mixed / divisor[:, None]
    result = token * HEADS + head
    mask = used[:, None] & (dim[None, :] < DIM)
    if SPLITS == 1:
        tl.store(out + result[:, None] * DIM + dim[None, :], mixed.to(out.dtype.element_ty), mask=mask)
    else:
        part = result * SPLITS + split
        lse = tl.where(total == 0, float("-inf"), highest + tl.log2(divisor))
        tl.store(partial + part[:, None] * DIM + dim[None, :], mixed, mask=mask)
        tl.store(partial_lse + part, lse, mask=used)


@jit
def _merge_kernel(
    partial,
    partial_lse,
    out,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a query head of a token: the parts, each weighed by its share of the softmax sum."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
    chunk: int | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Causal attention of each row's newest tokens over its cached keys: [T, H, D] -> [T, H, D], sums in float32.

    q [T, H, D] and the caches [K, slots, D] share one dtype and have a contiguous last dim; caches may also be in
    float8 e4m3, which becomes q's dtype as it is read. H is a multiple of K, and query head h attends to KV head
    h // (H / K). Row b has the tokens query_start[b]..query_start[b + 1] of q
    (int32 [B + 1], from 0 to T), which are the last of its context_len[b] positions (int32 [B]); their keys are in the
    cache already. Its blocks are those of row table_rows[b] (int32 [B]; None: row b) of block_table int32 [*, blocks];
    entries outside what the row's queries see are not read. A row with context_len 0 gives zeros: the padding of a
    captured batch.

    `max_query_len` is the most queries of a row. When it is 1, `num_splits` (a power of two; null: chosen from B, K and
    the device) says into how many parts the keys of each row are cut; a row's result depends on that number and on the
    row only. Where it is more, a query's result does not depend on how its row is cut into steps. `pdl`: launched as
    dependent on the kernel before it (compute capability 9.0 on), which must have waited for those before. `tile`: for
    measurements.

    A query sees keys of its own `chunk` of positions only. `sinks` [H]: of each query head a further score, of a key
    whose value is zero. Values may be narrower than keys; where there is one KV head then, groups of its query heads
    are programs of their own.
    """
    k_cache, v_cache = _apart(q, k_cache, v_cache)
    splits = num_splits or _num_splits(context_len.shape[0], k_cache.shape[0], multiprocessors(q.device))
    return _launch(
        q,
        k_cache,
        v_cache,
        (query_start, context_len, block_table, table_rows),
        block_size,
        (scale, window, chunk, softcap),
        sinks,
        one_query=max_query_len == 1,
        splits=splits if max_query_len == 1 else 1,
        pdl=pdl,
        tile=tile,
    )


def attend_own_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """`paged_attention` of rows without cached keys, to the same bits: keys and values are the step's, k, v [T, K, D].

    Use `fresh.fresh_attention`, which also knows other kernels.
    """
    formula = (scale, window, chunk, softcap)
    rows = (query_start, None, None, None)
    keys, values = _apart(q, k.transpose(0, 1), v.transpose(0, 1))
    return _launch(q, keys, values, rows, 0, formula, sinks, one_query=False, splits=1, pdl=pdl, tile=tile)


HEADS_TOGETHER = 16
"""Query heads of one program where keys are wider than values: such heads have several hundred channels."""


def _apart(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One KV head [1, slots, D] that many query heads share, as several that are the same memory."""
    count = q.shape[1] // HEADS_TOGETHER
    if k.shape[0] != 1 or k.shape[-1] == v.shape[-1] or count < 2 or q.shape[1] % HEADS_TOGETHER:
        return k, v
    return k.expand(count, -1, -1), v.expand(count, -1, -1)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    page: int,
    formula: tuple[float, int | None, int | None, float | None],
    sinks: Tensor | None,
    *,
    one_query: bool,
    splits: int,
    pdl: bool,
    tile: Tile | None,
) -> Tensor:
    """Run the kernels over keys and values [K, slots, D]: cache slots, or (page 0) the step's own tokens."""
    tokens, heads, _ = q.shape
    dim = v.shape[-1]
    rest = k.shape[-1] - dim
    num_rows, kv_heads = rows[0].shape[0] - 1, k.shape[0]
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens == 0 or heads == 0:
        return out
    k, v = as_bytes(k), as_bytes(v)
    assert heads % kv_heads == 0 and k.dtype == v.dtype in (q.dtype, torch.uint8), (q.shape, q.dtype, k.dtype)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    require_triton()
    group = heads // kv_heads
    tile = tile or _tile(group, dim, q.dtype, one_query, shared_memory(q.device))
    block_rest = max(16, next_power_of_2(rest)) if rest else 0
    tiles = num_rows if one_query else tokens // (tile.rows // group) + num_rows  # at least as many as the rows need
    partial, lse = out, out  # not used
    if splits > 1:
        partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device)
    # Scores are exponents of two, see the kernel.
    scale, window, chunk, softcap = formula
    score_factor, cap_factor = scale * math.log2(math.e), 1.0
    if softcap is not None:
        score_factor, cap_factor = scale / softcap, softcap * math.log2(math.e)
    dims = {"DIM": dim, "BLOCK_DIM": max(16, next_power_of_2(dim)), "SPLITS": splits, "PDL": pdl}
    launch = {"launch_pdl": True} if pdl else {}
    tensors = (q, k, v, out, partial, lse, *(rows[0] if tensor is None else tensor for tensor in (*rows, sinks)))
    table_stride = 0 if rows[2] is None else rows[2].stride(0)
    _attention_kernel[(tiles, kv_heads, splits)](
        *tensors,
        num_rows,
        table_stride,
        score_factor,
        cap_factor,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        HEADS=heads,
        GROUP=group,
        PAGE=page,
        REST=rest,
        BLOCK_REST=block_rest,
        WINDOW=window,
        CHUNK=chunk,
        CAPPED=softcap is not None,
        ONE_QUERY=one_query,
        HAS_TABLE_ROWS=rows[3] is not None,
        HAS_SINKS=sinks is not None,
        TILE_ROWS=tile.rows,
        TILE_KEYS=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dims,
        **launch,
    )
    if splits > 1:
        _merge_kernel[(tokens * heads,)](partial, lse, out, **dims, **launch)
    return out


@dataclass(frozen=True, slots=True)
class Tile:
    """Lines (queries times their heads) and keys of a program's tile, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@cache
def _tile(group: int, dim: int, dtype: torch.dtype, one_query: bool, shared: int) -> Tile:
    """For a device with `shared` bytes of shared memory. float32 has no tensor cores here, so its tiles are small."""
    fewest = max(16, next_power_of_2(group))  # 16: the least a matrix product takes
    if dtype == torch.float32:
        return Tile(fewest, 32 if dim <= 128 else 16, 4, 1)
    keys = 64 if dim <= 128 else 32
    if dim > 256:
        return Tile(fewest if one_query else max(32, fewest), keys, 4 if one_query else 8, 2)
    if one_query:
        return Tile(fewest, keys, 4, 3)
    if shared < LARGE_SHARED_MEMORY:
        return Tile(max(64, fewest), 32, 4, 2)
    return Tile(max(128, fewest), keys, 8, 3)


def _num_splits(rows: int, kv_heads: int, processors: int) -> int:
    """Parts to cut the keys of each row into: a power of two with about one program for each multiprocessor."""
    wanted = min(MAX_SPLITS, max(1, processors // max(1, rows * kv_heads)))
    return 1 << (wanted.bit_length() - 1)
